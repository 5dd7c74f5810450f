# What the scripts of emulated hosts share: asking agents, and a client that writes while processes are killed. They begin with it.
# UNDERSTUDY is the program.
fail() {
    echo "FAILED: $1"
    on a status web || :
    on b status web || :
    cat /run/*.log
    exit 1
}
# Asks again until it is so.
await() {
    tries=0
    until "$@" >/run/answer 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 2400 ] || fail "$* does not come about: $(cat /run/answer)"
        usleep 200000
    done
}
lines() { [ "$(wc -l </run/written)" -ge "$1" ]; }
on() {
    case $1 in
    w) control=/run/w/witness.sock ;;
    *) control=/run/$1/agent.sock ;;
    esac
    shift
    "$UNDERSTUDY" --control "$control" "$@"
}
code() { sed -n 's/^code *//p' /run/answer; }
# Everything is emulated, so patience is what a real host's agents would not have.
cat >/run/agent.toml <<END
[heartbeat]
interval = "1s"
silence = "10s"
unacknowledged = "20s"
END
# A client writes over one connection; these processes are killed; it goes on, and what it was told is compared with what is there.
goes_on_without() {
    mkfifo /run/ask
    "$UNDERSTUDY" demo worker write --to 10.77.7.2:6379 --tag n </run/ask >/run/written 2>/run/writer.log &
    exec 3>/run/ask
    await lines 1
    on a status web
    kill -9 "$@"
    echo "KILLED"
    echo >&3
    await lines 2
    exec 3>&-
    await lines 3
    written=$(tail -n 1 /run/written)
    echo "WRITTEN $written"
    acked=${written#*\"acked\":}
    checked=$("$UNDERSTUDY" demo worker check --to 10.77.7.2:6379 --tag n --acked "${acked%%,*}")
    echo "CHECKED $checked"
    on b status web
}
set -e
