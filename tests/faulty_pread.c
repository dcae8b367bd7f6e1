/* Preloaded by tests/test_reader_faults.py: makes pread(2) fail in the ways a drive can. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

enum { NONE, ERROR, SHORT, FLIP };

static atomic_int kind, left, value;

/* The next `count` reads: fail with errno `what`, return at most `what` bytes, or have a bit wrong.
 */
void plan_fault(int fault, int count, int what) {
  value = what;
  left = count;
  kind = fault;
}

int faults_left(void) { return left; }

static ssize_t faulty(int fd, void* buffer, size_t length, off64_t offset) {
  static ssize_t (*real)(int, void*, size_t, off64_t);
  if (!real) real = (ssize_t (*)(int, void*, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
  if (kind == NONE || atomic_fetch_sub(&left, 1) <= 0) return real(fd, buffer, length, offset);
  if (kind == ERROR) {
    errno = value;
    return -1;
  }
  ssize_t got = real(fd, buffer, length, offset);
  if (kind == FLIP && got > 0) ((unsigned char*)buffer)[got / 2] ^= 4;
  if (kind == SHORT && got > value) got = value;
  return got;
}

ssize_t pread(int fd, void* buffer, size_t length, off_t offset) {
  return faulty(fd, buffer, length, offset);
}
ssize_t pread64(int fd, void* buffer, size_t length, off64_t offset) {
  return faulty(fd, buffer, length, offset);
}
