//! As much of Redis's protocol as the laboratory speaks.

use anyhow::{Result, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// The longest value that is read.
const MAX_VALUE: usize = 4096;
/// The longest list that is read.
const MAX_LIST: usize = 4096;

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    /// `+text`
    Simple(String),
    /// `-text`
    Error(String),
    /// `:number`
    Number(i64),
    /// `$length`, or nothing.
    Value(Option<Vec<u8>>),
    /// `*length` of values.
    List(Vec<Option<Vec<u8>>>),
}

/// Appends a request to `out`.
pub(super) fn request(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
    line: Vec<u8>,
}

impl Connection {
    /// Takes over a connected stream.
    ///
    /// # Errors
    /// If it cannot be set to send small requests at once.
    pub(super) fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), line: Vec::new() })
    }

    /// Sends bytes made by [`request`] and reads one reply.
    ///
    /// # Errors
    /// If the connection fails or the peer does not speak the protocol.
    pub(super) async fn ask(&mut self, request: &[u8]) -> Result<Reply> {
        self.stream.write_all(request).await?;
        self.reply().await
    }

    async fn line(&mut self) -> Result<(u8, String)> {
        self.line.clear();
        let read = (&mut self.stream).take(MAX_VALUE as u64).read_until(b'\n', &mut self.line).await?;
        let text = match self.line.strip_suffix(b"\r\n") {
            Some([kind, rest @ ..]) => (*kind, String::from_utf8_lossy(rest).into_owned()),
            _ if read == 0 => bail!("the connection was closed"),
            _ => bail!("not a reply: {:?}", String::from_utf8_lossy(&self.line)),
        };
        Ok(text)
    }

    async fn value(&mut self, length: &str) -> Result<Option<Vec<u8>>> {
        if length == "-1" {
            return Ok(None);
        }
        let length: usize = length.parse()?;
        if length > MAX_VALUE {
            bail!("a value of {length} bytes");
        }
        let mut value = vec![0; length + 2];
        self.stream.read_exact(&mut value).await?;
        value.truncate(length);
        Ok(Some(value))
    }

    /// Reads one more reply, to a request that was sent together with another one.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub(super) async fn reply(&mut self) -> Result<Reply> {
        let (kind, rest) = self.line().await?;
        Ok(match kind {
            b'+' => Reply::Simple(rest),
            b'-' => Reply::Error(rest),
            b':' => Reply::Number(rest.parse()?),
            b'$' => Reply::Value(self.value(&rest).await?),
            b'*' => {
                let length: usize = rest.parse()?;
                if length > MAX_LIST {
                    bail!("a list of {length}");
                }
                let mut list = Vec::with_capacity(length);
                for _ in 0..length {
                    match self.line().await? {
                        (b'$', length) => list.push(self.value(&length).await?),
                        (other, _) => bail!("a list with a `{}` in it", char::from(other)),
                    }
                }
                Reply::List(list)
            }
            other => bail!("a reply of unknown kind {other}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn reads_each_kind_of_reply_also_in_pieces() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 14];
            stream.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"*1\r\n$4\r\nPING\r\n");
            for piece in ["+PO", "NG\r\n-ERR no\r\n:4", "2\r\n$-1\r\n$2\r\na\n\r", "\n*2\r\n$-1\r\n$1\r\nx\r\n?\r\n"] {
                stream.write_all(piece.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        let mut connection = Connection::new(TcpStream::connect(address).await.unwrap()).unwrap();
        let mut ping = Vec::new();
        request(&mut ping, &[b"PING"]);
        assert_eq!(connection.ask(&ping).await.unwrap(), Reply::Simple("PONG".to_owned()));
        assert_eq!(connection.reply().await.unwrap(), Reply::Error("ERR no".to_owned()));
        assert_eq!(connection.reply().await.unwrap(), Reply::Number(42));
        assert_eq!(connection.reply().await.unwrap(), Reply::Value(None));
        assert_eq!(connection.reply().await.unwrap(), Reply::Value(Some(b"a\n".to_vec())));
        assert_eq!(connection.reply().await.unwrap(), Reply::List(vec![None, Some(b"x".to_vec())]));
        assert!(connection.reply().await.is_err(), "an unknown kind is refused");
        server.await.unwrap();
        assert!(connection.reply().await.is_err(), "a closed connection is no reply");
    }
}
