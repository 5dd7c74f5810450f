//! A terminal that `status --watch` draws in.
//!
//! Promise: what is drawn fits the window, also when the window changes; a drawing takes the place of the one before without a
//! flicker; when it ends, the terminal is as it was, with the last drawing below what was there.

use terminal_size::{Height, Width, terminal_size};

use super::commands::print;
use super::exit::CliError;

/// Another screen, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
/// The window of a terminal that does not say.
const USUAL: (usize, usize) = (80, 24);
/// Before what goes on from the line above.
const INDENT: &str = "    ";

/// See the module.
#[derive(Debug)]
pub(super) struct Screen {
    last: String,
}

impl Screen {
    /// Takes the terminal at standard output.
    pub(super) fn open() -> Result<Self, CliError> {
        print(ENTER)?;
        Ok(Self { last: String::new() })
    }

    /// Draws `text` in place of what was drawn before.
    pub(super) fn draw(&mut self, text: String) -> Result<(), CliError> {
        let (columns, rows) =
            terminal_size().map_or(USUAL, |(Width(columns), Height(rows))| (columns.into(), rows.into()));
        self.last = text;
        print(&frame(&self.last, columns, rows))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = print(&format!("{LEAVE}{}", self.last));
    }
}

/// `text` for a window of this size.
fn frame(text: &str, columns: usize, rows: usize) -> String {
    let columns = columns.max(2 * INDENT.len());
    let mut lines: Vec<String> = text.lines().flat_map(|line| wrap(line, columns)).collect();
    if lines.len() > rows {
        let more = lines.len() - rows.saturating_sub(1);
        lines.truncate(rows.saturating_sub(1));
        lines.extend(wrap(&format!("... and {more} lines more"), columns).into_iter().next());
    }
    let lines: Vec<String> = lines.into_iter().map(|line| line + CLEAR_LINE).collect();
    format!("{HOME}{}{CLEAR_BELOW}", lines.join("\r\n"))
}

/// A line in pieces of at most `columns` characters, which are more than [`INDENT`]'s, broken at spaces where there are some. What would move the cursor is not
/// drawn: names are others' words.
fn wrap(line: &str, columns: usize) -> Vec<String> {
    let mut rest: Vec<char> = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let mut pieces = Vec::new();
    while rest.len() > columns {
        let at = rest[..=columns].iter().rposition(|&c| c == ' ').filter(|&at| at > columns / 2).unwrap_or(columns);
        let next = rest.split_off(at);
        pieces.push(rest.into_iter().collect());
        rest = INDENT.chars().chain(next.into_iter().skip_while(|&c| c == ' ')).collect();
    }
    pieces.push(rest.into_iter().collect());
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_broken_at_words_and_nothing_is_lost() {
        let pieces = wrap("web-1 runs, but would be lost with its host", 20);
        assert_eq!(pieces, ["web-1 runs, but", "    would be lost", "    with its host"]);
        let pieces = wrap(&"x".repeat(50), 20);
        assert_eq!(pieces.iter().map(|piece| piece.chars().count()).collect::<Vec<_>>(), [20, 20, 18]);
        assert_eq!(wrap("fits exactly", 12), ["fits exactly"]);
        assert_eq!(wrap("", 12), [""]);
    }

    #[test]
    fn a_drawing_fits_its_window_and_clears_what_was_there() {
        let text = "one\ntwo\nthree\nfour\n";
        assert_eq!(frame(text, 20, 4), "\x1b[Hone\x1b[K\r\ntwo\x1b[K\r\nthree\x1b[K\r\nfour\x1b[K\x1b[J");
        let small = frame(text, 40, 3);
        assert!(small.contains("two") && !small.contains("three"), "{small:?}");
        assert!(small.contains("and 2 lines more"), "{small:?}");
        for rows in 0..3 {
            assert!(frame(text, 1, rows).matches("\r\n").count() < rows.max(1), "{rows} rows");
        }
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        let drawn = frame("a \x1b[2J\x07b", 40, 3);
        assert_eq!(drawn, "\x1b[Ha \u{fffd}[2J\u{fffd}b\x1b[K\x1b[J");
    }
}
