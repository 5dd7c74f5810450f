#!/bin/sh
# The first process of a host that is itself emulated: loads KVM, mounts what it was given as a disk, and runs /run.sh of that.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
for module in $(cat /lib/modules/order); do
    insmod "/lib/modules/$module.ko" || echo "FAILED to load $module"
done
# One of them is this processor's.
insmod /lib/modules/kvm-amd.ko 2>/dev/null || insmod /lib/modules/kvm-intel.ko 2>/dev/null || echo "FAILED to load KVM"
ip link set lo up
mount -o ro /dev/vda /mnt || echo "FAILED to mount the disk"
mount -t tmpfs bin /mnt/bin
cat /bin/busybox >/mnt/bin/busybox
/bin/busybox chmod 755 /mnt/bin/busybox
chroot /mnt /bin/busybox --install -s /bin 2>/dev/null
mount -t proc proc /mnt/proc
mount -t sysfs sysfs /mnt/sys
mount -t devtmpfs dev /mnt/dev
mount -t tmpfs tmpfs /mnt/run
mount -t tmpfs tmpfs /mnt/var
echo "HOST-READY"
chroot /mnt /bin/sh /run.sh
echo "HOST-ENDED $?"
poweroff -f
