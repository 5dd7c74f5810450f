#!/bin/sh
# The first process of the demo's guest: network from the kernel command line, then Redis.
# us.disk=DEVICE holds an ext4 file system, in which Redis then keeps every write before it says that it is done.
# us.serve=postgres: that file system holds a PostgreSQL, which is served instead.
# us.ip=ADDRESS/LENGTH is the first card's, us.ip1= the second's; with IPv6 enabled each also has its link-local address.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
for module in $(cat /lib/modules/order); do
    insmod "/lib/modules/$module.ko" || echo "FAILED to load $module"
done
for word in $(cat /proc/cmdline); do
    case $word in
    us.ip=*) address=${word#us.ip=} ;;
    us.ip1=*) second=${word#us.ip1=} ;;
    us.disk=*) disk=${word#us.disk=} ;;
    us.serve=*) serve=${word#us.serve=} ;;
    esac
done
# Each card answers for its own address alone.
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
ip link set lo up
ip link set eth0 up
ip addr add "$address" dev eth0
if [ -n "$second" ]; then
    ip link set eth1 up
    ip addr add "$second" dev eth1
fi
echo 1 >/proc/sys/vm/overcommit_memory
keep="--appendonly no"
if [ -n "$disk" ]; then
    mkdir /data
    mount -t ext4 "$disk" /data || echo "FAILED to mount $disk"
    keep="--appendonly yes --appendfsync always --dir /data"
fi
if [ "$serve" = postgres ]; then
    mount -t devtmpfs dev /data/dev
    mount -t proc proc /data/proc
    chroot /data /bin/busybox start-stop-daemon -S -q -c postgres -x /postgres/postgres -- -D /pg
    umount /data/proc
    umount /data/dev
    umount /data || echo "FAILED to unmount $disk"
    echo "the database has ended"
    poweroff -f
fi
redis-server --save "" $keep --bind '* -::*' --protected-mode no --loglevel warning --tcp-keepalive 0 &
until printf 'PING\r\nQUIT\r\n' | nc 127.0.0.1 6379 2>/dev/null | grep -q PONG; do
    usleep 20000
done
echo READY
wait
# SHUTDOWN SAVE asks for a reboot: each write is in the log, so what it saved is needed for nothing else.
if [ -e /data/dump.rdb ]; then
    rm /data/dump.rdb
    again=yes
fi
[ -z "$disk" ] || umount /data || echo "FAILED to unmount $disk"
if [ -n "$again" ]; then
    echo "reboots"
    reboot -f
fi
echo "FAILED: redis-server has ended"
poweroff -f
