# Two hosts and a witness in namespaces of one emulated host, and a stock QEMU with its accelerator: protected while it runs, and killed with its agent.
# UNDERSTUDY is the program, IP iproute2's, GUEST the directory of the guest image, CPU the guest's processor. What it says is judged by who started it.
# This shell prefers its own.
ip() { "$IP" "$@"; }
within() {
    space=$1
    shift
    exec "$IP" netns exec "$space" "$@"
}

# The switch between the hosts, with the witness and the clients at it.
mkdir -p /var/run /run/a /run/b /run/w
ip link add br0 type bridge forward_delay 0
ip addr add 10.77.7.1/24 dev br0
ip link set br0 up
for host in a b; do
    ip netns add $host
    ip link add to-$host type veth peer name uplink netns $host
    ip link set to-$host master br0 up
    ip -n $host link set lo up
    ip -n $host link add br0 type bridge forward_delay 0
    ip -n $host link set uplink master br0 up
    ip -n $host link set br0 up
done
ip -n a addr add 10.77.7.11/24 dev br0
ip -n b addr add 10.77.7.12/24 dev br0
ip -n a tuntap add dev tap0 mode tap
ip -n a link set tap0 master br0 up

(within a qemu-system-x86_64 -name web -M q35 -accel kvm -cpu "$CPU" -smp 1 -m 192 -nodefaults -display none \
    -kernel "$GUEST/vmlinuz" -initrd "$GUEST/initrd.img" -append "$(cat "$GUEST/cmdline") us.ip=10.77.7.2/24" \
    -netdev tap,id=net0,ifname=tap0,script=no,downscript=no \
    -device virtio-net-pci,netdev=net0,mac=52:54:00:77:00:02,romfile= \
    -qmp unix:/run/a/qmp.sock,server=on,wait=off -serial file:/run/guest.log) >/run/qemu.log 2>&1 &
vm=$!
"$UNDERSTUDY" demo worker ping --to 10.77.7.2:6379 --seconds 400 || fail "Redis does not answer"
echo "ANSWERS"
"$UNDERSTUDY" witness --name w --listen 10.77.7.1:7846 --state-dir /var/w --run-dir /run/w >/run/w.log 2>&1 &
(within a "$UNDERSTUDY" agent --config /run/agent.toml --name a --listen 10.77.7.11:7844 --state-dir /var/a --run-dir /run/a --metrics off) >/run/a.log 2>&1 &
agent=$!
(within b "$UNDERSTUDY" agent --config /run/agent.toml --name b --listen 10.77.7.12:7844 --state-dir /var/b --run-dir /run/b --metrics off) >/run/b.log 2>&1 &
for host in a b; do
    await on w pair --witness
    await on $host pair 10.77.7.1 --code "$(code)" --witness
done
await on b pair
await on a pair 10.77.7.12 --code "$(code)"
echo "PAIRED"
on a doctor web
# Also an agent may be too slow for the other here, and is asked again.
await on a protect web --to b
echo "PROTECTED"
goes_on_without $vm $agent
