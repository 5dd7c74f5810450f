# Two agents and a witness on one emulated host, and between them a microVM with Linux and Redis, which is killed with its agent.
# UNDERSTUDY is the program, GUEST the directory of the guest image. What it says is judged by who started it.

ip link add br0 type bridge
ip addr add 10.77.7.1/24 dev br0
ip link set br0 up
"$UNDERSTUDY" agent --config /run/agent.toml --name a --listen 127.0.0.1:7844 --state-dir /var/a --run-dir /run/a --metrics off >/run/a.log 2>&1 &
primary=$!
await on a status
# Memory that the kernel gives back is zero then, and costs nothing to copy.
on a run web --kernel "$GUEST/vmlinuz" --initrd "$GUEST/initrd.img" \
    --cmdline "$(cat "$GUEST/cmdline") us.ip=10.77.7.2/24 init_on_free=1" --tap web0 --bridge br0 --memory 128MiB --cpus 1
"$UNDERSTUDY" witness --name w --listen 127.0.0.3:7846 --state-dir /var/w --run-dir /run/w >/run/w.log 2>&1 &
"$UNDERSTUDY" agent --config /run/agent.toml --name b --listen 127.0.0.2:7844 --state-dir /var/b --run-dir /run/b --metrics off >/run/b.log 2>&1 &
for host in a b; do
    await on w pair --witness
    await on $host pair 127.0.0.3 --code "$(code)" --witness
done
await on b pair
await on a pair 127.0.0.2 --code "$(code)"
echo "PAIRED"
"$UNDERSTUDY" demo worker ping --to 10.77.7.2:6379 --seconds 400 || fail "Redis does not answer"
echo "ANSWERS"
# Also an agent may be too slow for the other here, and is asked again.
await on a protect web --to b
echo "PROTECTED"
goes_on_without $primary
