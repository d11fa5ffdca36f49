/* LD_PRELOAD for a Redis: a disk that can be full, and that tells what is on it for certain.
   After each fsync that came back, the size that the file had before it goes to $FSYNC_LOG: what lies beyond the last
   of these sizes is what a power cut may take. While the file $DISK_FULL exists, no write goes into a file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int log_and_call(const char *name, int fd) {
    int (*call)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    struct stat before;
    int known = fstat(fd, &before) == 0 && S_ISREG(before.st_mode);
    int answer = call(fd);
    if (answer == 0 && known) {
        char link[64], path[4096], line[4200];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length > 0) {
            path[length] = 0;
            int size = snprintf(line, sizeof line, "%lld %s\n", (long long)before.st_size, path);
            int log = open(getenv("FSYNC_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0600);
            if (write(log, line, size) != size) abort();
            close(log);
        }
    }
    return answer;
}

int fsync(int fd) { return log_and_call("fsync", fd); }
int fdatasync(int fd) { return log_and_call("fdatasync", fd); }

ssize_t write(int fd, const void *bytes, size_t count) {
    static ssize_t (*call)(int, const void *, size_t);
    if (!call) call = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    struct stat file;
    const char *full = getenv("DISK_FULL");
    if (full && access(full, F_OK) == 0 && fstat(fd, &file) == 0 && S_ISREG(file.st_mode)) {
        errno = ENOSPC;
        return -1;
    }
    return call(fd, bytes, count);
}
