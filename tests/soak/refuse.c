/* Preloaded into a process: calls with a path that ends with $REFUSE_PATH fail with the error number $REFUSE_ERRNO, as an
   inode with a damaged checksum does. With $REFUSE_CHANGES unset, only those that read. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>

static int refused(const char *path, int changes) {
    const char *end = getenv("REFUSE_PATH"), *number = getenv("REFUSE_ERRNO");
    if (!path || !end || !number || (changes && !getenv("REFUSE_CHANGES"))) return 0;
    size_t have = strlen(path), want = strlen(end);
    if (have < want || strcmp(path + have - want, end)) return 0;
    errno = atoi(number);
    return 1;
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags, last) \
    mode_t mode = 0; \
    if ((flags) & 0100) { va_list more; va_start(more, last); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) { MODE(flags, flags) return refused(path, 0) ? -1 : NEXT(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, flags) return refused(path, 0) ? -1 : NEXT(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, flags) return refused(path, 0) ? -1 : NEXT(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, flags) return refused(path, 0) ? -1 : NEXT(openat64)(at, path, flags, mode); }
int stat(const char *path, struct stat *s) { return refused(path, 0) ? -1 : NEXT(stat)(path, s); }
int stat64(const char *path, struct stat64 *s) { return refused(path, 0) ? -1 : NEXT(stat64)(path, s); }
int lstat(const char *path, struct stat *s) { return refused(path, 0) ? -1 : NEXT(lstat)(path, s); }
int lstat64(const char *path, struct stat64 *s) { return refused(path, 0) ? -1 : NEXT(lstat64)(path, s); }
int fstatat(int at, const char *path, struct stat *s, int flags) { return refused(path, 0) ? -1 : NEXT(fstatat)(at, path, s, flags); }
int fstatat64(int at, const char *path, struct stat64 *s, int flags) { return refused(path, 0) ? -1 : NEXT(fstatat64)(at, path, s, flags); }
int rename(const char *from, const char *to) { return refused(from, 1) || refused(to, 1) ? -1 : NEXT(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { return refused(from, 1) || refused(to, 1) ? -1 : NEXT(renameat)(a, from, b, to); }
int unlink(const char *path) { return refused(path, 1) ? -1 : NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { return refused(path, 1) ? -1 : NEXT(unlinkat)(at, path, flags); }
int rmdir(const char *path) { return refused(path, 1) ? -1 : NEXT(rmdir)(path); }
