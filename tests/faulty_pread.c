/* Preloaded by tests/test_reader_faults.py: makes pread(2) fail in the ways a drive can. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum { NONE, ERROR, SHORT, FLIP, RANDOM };

static atomic_int kind, left, value;
static atomic_int failed, shortened, slowed;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned random_state;
static off64_t recent[64]; /* where a read went wrong, which the next one there must not */

/* The next `count` reads: fail with errno `what`, return at most `what` bytes, or have a bit wrong.
 */
void plan_fault(int fault, int count, int what) {
  value = what;
  left = count;
  kind = fault;
}

int faults_left(void) { return left; }

/* From now on, of a thousand reads, about `per_mille` fail with EIO, as many come short, and as many
 * take 100 ms: in a sequence that `seed` begins. */
void plan_random(int seed, int per_mille) {
  random_state = (unsigned)seed;
  failed = shortened = slowed = 0;
  plan_fault(RANDOM, 1 << 30, per_mille);
}

int faults_of(int which) { return which == ERROR ? failed : which == SHORT ? shortened : slowed; }

static unsigned next_random(void) {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}

/* What a read is to give: minus 1 for EIO, `length` or less. */
static ssize_t random_length(size_t length, off64_t offset) {
  pthread_mutex_lock(&lock);
  off64_t* place = &recent[(offset >> 12) % 64];
  unsigned fate = next_random() % 1000, rate = (unsigned)value;
  ssize_t wanted = (ssize_t)length;
  int sleeps = 0;
  if (*place == offset + 1) {
    *place = 0;
  } else if (fate < 3 * rate) {
    *place = offset + 1;
    if (fate < rate) {
      wanted = -1;
      ++failed;
    } else if (fate < 2 * rate) {
      wanted = 1 + (ssize_t)(next_random() % (length > 1 ? length - 1 : 1));
      ++shortened;
    } else {
      sleeps = 1;
      ++slowed;
    }
  }
  pthread_mutex_unlock(&lock);
  if (sleeps) usleep(100000);
  return wanted;
}

static ssize_t faulty(int fd, void* buffer, size_t length, off64_t offset) {
  static ssize_t (*real)(int, void*, size_t, off64_t);
  if (!real) real = (ssize_t (*)(int, void*, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
  if (kind == NONE || atomic_fetch_sub(&left, 1) <= 0) return real(fd, buffer, length, offset);
  const ssize_t most = kind == RANDOM ? random_length(length, offset) : (ssize_t)length;
  if (kind == ERROR || most < 0) {
    errno = most < 0 ? EIO : value;
    return -1;
  }
  ssize_t got = real(fd, buffer, length, offset);
  if (kind == FLIP && got > 0) ((unsigned char*)buffer)[got / 2] ^= 4;
  const ssize_t given = kind == SHORT && value < most ? value : most;
  if (got <= given) return got;
  memset((char*)buffer + given, 0xA5, (size_t)(got - given)); /* nothing came there */
  return given;
}

ssize_t pread(int fd, void* buffer, size_t length, off_t offset) {
  return faulty(fd, buffer, length, offset);
}
ssize_t pread64(int fd, void* buffer, size_t length, off64_t offset) {
  return faulty(fd, buffer, length, offset);
}
