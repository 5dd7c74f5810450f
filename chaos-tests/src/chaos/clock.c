/* A wall clock that jumps, for one process: loaded before libc. The monotonic clock never does, as on any host.
   UNDERSTUDY_CLOCK names a file of two 64-bit numbers: nanoseconds to add, and how often a clock that was off was read. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t *shared;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("UNDERSTUDY_CLOCK");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED)
        shared = page;
}

int clock_gettime(clockid_t id, struct timespec *time)
{
    int result = (int)syscall(SYS_clock_gettime, id, time);
    int64_t off = shared ? __atomic_load_n(&shared[0], __ATOMIC_SEQ_CST) : 0;
    if (result == 0 && off != 0 && id == CLOCK_REALTIME) {
        int64_t all = (int64_t)time->tv_sec * 1000000000 + time->tv_nsec + off;
        time->tv_sec = all / 1000000000;
        time->tv_nsec = all % 1000000000;
        __atomic_fetch_add(&shared[1], 1, __ATOMIC_SEQ_CST);
    }
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return result;
}
