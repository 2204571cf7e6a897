/* Preloaded (LD_PRELOAD) into a daemon, it fails chosen calls on the files of its database, and moves its wall clock.
 *
 * The test tells it what to do while the daemon runs, by a small file that both have mapped: `struct control`, which
 * preload.py knows too. The environment variable FAULTS names it; without one this library changes nothing.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define S_NS 1000000000LL

enum kind { WRITE, READ, SYNC, TRUNCATE, OPEN, KINDS };

struct control {
    int64_t clock_offset_ns; /* added to the wall clock; the monotonic one is left alone, as the kernel leaves it */
    int64_t part;            /* bytes that a failing write writes nevertheless */
    struct {
        int64_t seen;  /* calls so far */
        int64_t first; /* the number, from 1, of the first one that fails; 0: none does */
        int64_t last;  /* and of the last one */
        int64_t error; /* with this errno */
    } of[KINDS];
};

static struct control nothing; /* where no file is named */
static struct control *control = &nothing;
static const char *const database = "carserver.db"; /* also in the names of its -wal and -shm */

/* The function of this name that the program would have had without us. */
#define REAL(name)                                   \
    ({                                               \
        static __typeof__(&name) found;              \
        if (found == NULL)                           \
            found = dlsym(RTLD_NEXT, #name);         \
        found;                                       \
    })

static int64_t get(const int64_t *field)
{
    return __atomic_load_n(field, __ATOMIC_SEQ_CST);
}

__attribute__((constructor)) static void map_control(void)
{
    const char *path = getenv("FAULTS");
    if (path == NULL)
        return;
    int fd = REAL(open64)(path, O_RDWR | O_CLOEXEC);
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        perror(path);
        abort();
    }
    close(fd);
    control = mapped;
}

/* Counts a call. Whether it is to fail: errno then says why. */
static bool fails(enum kind kind)
{
    int64_t number = __atomic_add_fetch(&control->of[kind].seen, 1, __ATOMIC_SEQ_CST);
    int64_t first = get(&control->of[kind].first);
    if (first == 0 || number < first || number > get(&control->of[kind].last))
        return false;
    errno = (int)get(&control->of[kind].error);
    return true;
}

static bool is_database(int fd)
{
    if (control == &nothing)
        return false;
    char link[40], path[4096];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    path[size < 0 ? 0 : size] = '\0';
    return strstr(path, database) != NULL;
}

/* How much a failing write of so many bytes writes; the error that it then returns is kept. */
static size_t part(size_t size)
{
    size_t wanted = (size_t)get(&control->part);
    return wanted < size ? wanted : size;
}

ssize_t write(int fd, const void *bytes, size_t size)
{
    if (!is_database(fd) || !fails(WRITE))
        return REAL(write)(fd, bytes, size);
    int error = errno;
    (void)!REAL(write)(fd, bytes, part(size));
    errno = error;
    return -1;
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset)
{
    if (!is_database(fd) || !fails(WRITE))
        return REAL(pwrite64)(fd, bytes, size, offset);
    int error = errno;
    (void)!REAL(pwrite64)(fd, bytes, part(size), offset);
    errno = error;
    return -1;
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    return pwrite64(fd, bytes, size, offset);
}

ssize_t read(int fd, void *bytes, size_t size)
{
    return is_database(fd) && fails(READ) ? -1 : REAL(read)(fd, bytes, size);
}

ssize_t pread64(int fd, void *bytes, size_t size, off64_t offset)
{
    return is_database(fd) && fails(READ) ? -1 : REAL(pread64)(fd, bytes, size, offset);
}

ssize_t pread(int fd, void *bytes, size_t size, off_t offset)
{
    return pread64(fd, bytes, size, offset);
}

int fdatasync(int fd)
{
    return is_database(fd) && fails(SYNC) ? -1 : REAL(fdatasync)(fd);
}

int fsync(int fd)
{
    return is_database(fd) && fails(SYNC) ? -1 : REAL(fsync)(fd);
}

int ftruncate64(int fd, off64_t size)
{
    return is_database(fd) && fails(TRUNCATE) ? -1 : REAL(ftruncate64)(fd, size);
}

int ftruncate(int fd, off_t size)
{
    return ftruncate64(fd, size);
}

static int open_in(int folder, const char *path, int flags, va_list rest)
{
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    if (strstr(path, database) != NULL && fails(OPEN))
        return -1;
    return REAL(openat64)(folder, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    int fd = open_in(AT_FDCWD, path, flags, rest);
    va_end(rest);
    return fd;
}

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    int fd = open_in(AT_FDCWD, path, flags, rest);
    va_end(rest);
    return fd;
}

int openat64(int folder, const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    int fd = open_in(folder, path, flags, rest);
    va_end(rest);
    return fd;
}

/* The wall clock, by each of its names. */

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = REAL(clock_gettime)(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t moved = now->tv_sec * S_NS + now->tv_nsec + get(&control->clock_offset_ns);
        now->tv_sec = moved / S_NS;
        now->tv_nsec = moved % S_NS;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec moved;
    (void)zone; /* obsolete, and always NULL */
    if (clock_gettime(CLOCK_REALTIME, &moved) != 0)
        return -1;
    now->tv_sec = moved.tv_sec;
    now->tv_usec = moved.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec moved;
    if (clock_gettime(CLOCK_REALTIME_COARSE, &moved) != 0)
        return -1;
    if (now != NULL)
        *now = moved.tv_sec;
    return moved.tv_sec;
}
