#!/bin/sh
# A guest that counts, for tests (`rdinit=/tick`): each tick rewrites one file of random bytes and reads all of them again.
# us.ticks=N switches the machine off after N of them; us.reset resets it then instead.
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mkdir /tmp
mount -t tmpfs tmp /tmp
ticks=1000000
end="poweroff -f"
for word in $(cat /proc/cmdline); do
    case $word in
    us.ticks=*) ticks=${word#us.ticks=} ;;
    us.reset) end="reboot -f" ;;
    esac
done
echo "PROCESSORS $(grep -c ^processor /proc/cpuinfo)"
echo "CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource 2>/dev/null)"
tick=0
while [ "$tick" -lt "$ticks" ]; do
    tick=$((tick + 1))
    file=/tmp/$((tick % 8))
    dd if=/dev/urandom of="$file" bs=64k count=2 2>/dev/null
    md5sum "$file" >"$file.sum"
    for sum in /tmp/*.sum; do
        md5sum -c "$sum" >/dev/null || echo "CORRUPT $sum"
    done
    read -r up _ </proc/uptime
    echo "TICK $tick $up"
    usleep 50000
done
$end
