/* Lets the n-th call that changes a file below one folder fail as on a full disk; preloaded by `writes.py`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1;
static int fired;
static char root[PATH_MAX];

void fault_arm(long n, const char *folder) {
    fired = 0;
    snprintf(root, sizeof root, "%s", folder);
    left = n;
}

int fault_fired(void) { return fired; }

static int fails(void) {
    if (left <= 0 || --left > 0) return 0;
    fired = 1;
    errno = ENOSPC;
    return 1;
}

static int below(const char *path) { return left > 0 && path && strncmp(path, root, strlen(root)) == 0; }

static int of(int descriptor) {
    char name[64], path[PATH_MAX];
    ssize_t length;
    if (left <= 0) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);

ssize_t write(int d, const void *b, size_t n) { REAL(write) return of(d) && fails() ? -1 : real(d, b, n); }
ssize_t writev(int d, const struct iovec *v, int n) { REAL(writev) return of(d) && fails() ? -1 : real(d, v, n); }
ssize_t pwrite(int d, const void *b, size_t n, off_t o) { REAL(pwrite) return of(d) && fails() ? -1 : real(d, b, n, o); }
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) { REAL(pwrite64) return of(d) && fails() ? -1 : real(d, b, n, o); }
int fsync(int d) { REAL(fsync) return of(d) && fails() ? -1 : real(d); }
int ftruncate(int d, off_t n) { REAL(ftruncate) return of(d) && fails() ? -1 : real(d, n); }
int ftruncate64(int d, off64_t n) { REAL(ftruncate64) return of(d) && fails() ? -1 : real(d, n); }
int posix_fallocate(int d, off_t o, off_t n) { REAL(posix_fallocate) return of(d) && fails() ? ENOSPC : real(d, o, n); }
int rename(const char *a, const char *b) { REAL(rename) return below(b) && fails() ? -1 : real(a, b); }
int mkdir(const char *p, mode_t m);
