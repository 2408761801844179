/* The endpoint's half of the line protocol, for contenders written in C.
 *
 * Owns what `endpoint.py` and `workload.py` own for Python, and must stay equal to them: the
 * commands, the contents of the source, the placement of pages, the check of the target, the clock.
 * `tests/unit/test_bench_workload.py` compares the two. A contender includes this file, fills in
 * the functions of `struct contender`, and calls `serve` from its main.
 *
 * Layout of a process's one buffer:
 *     0                data area, data_bytes: source contents, or what the source's writes leave
 *     data_bytes       word that goes out while bouncing
 *     data_bytes + 64  word that comes in
 *
 * Errors end in `fail`, which answers `error TEXT` and leaves: a contender that failed once is not
 * measured further in that round.
 */
#ifndef ANYFABRIC_BENCH_ENDPOINT_H
#define ANYFABRIC_BENCH_ENDPOINT_H

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { kMailBytes = 4096, kInOffset = 64, kClearByte = 0xA5, kPollsPerClock = 1 << 16 };
static const uint64_t kSourceSalt = 0x534F55524345, kTargetSalt = 0x544152474554;
static const uint64_t kDeadlineNs = 60000000000ull;

enum operation { kWrite, kPages, kNotify, kFlag };

struct load {
    enum operation operation;
    uint64_t size_bytes, num_pages, span_bytes, num_calls, num_warmup, seed;
};

struct endpoint {
    bool is_source;
    uint64_t data_bytes;
    uint8_t *buffer;
    uint64_t bad_words;
    FILE *answers;
};

/* What a contender supplies; the meaning of each is that of the Python method of its name. */
struct contender {
    const char *(*version)(void);
    size_t (*setup)(struct endpoint *, uint8_t *blob, size_t capacity);
    const char *(*connect)(struct endpoint *, const uint8_t *blob, size_t nbytes);
    void (*write)(struct endpoint *, uint64_t offset, uint64_t nbytes);
    void (*write_pages)(struct endpoint *, const uint32_t *source, const uint32_t *target,
                        uint64_t num_pages, uint64_t page_bytes);
    void (*announce)(struct endpoint *);
    void (*await_announcement)(struct endpoint *, const struct load *);
    void (*notify)(struct endpoint *); /* null: not measured */
    void (*await_notification)(struct endpoint *, uint64_t word);
    void (*flag)(struct endpoint *);       /* null: not measured */
    void (*poll_flag)(struct endpoint *);  /* progress while polling; null: none needed */
    void (*progress)(struct endpoint *);   /* progress between commands; null: none needed */
};

static struct endpoint endpoint;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(endpoint.answers, "error ");
    vfprintf(endpoint.answers, format, arguments);
    fprintf(endpoint.answers, "\n");
    fflush(endpoint.answers);
    va_end(arguments);
    _exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* Counts the polls of one wait and fails it at the deadline; the clock is read rarely. */
struct patience {
    uint64_t polls, deadline_ns;
};

static inline void wait_more(struct patience *patience, const char *what)
{
    if (++patience->polls % kPollsPerClock)
        return;
    if (!patience->deadline_ns)
        patience->deadline_ns = now_ns() + kDeadlineNs;
    else if (now_ns() > patience->deadline_ns)
        fail("%s did not arrive within %d s", what, (int)(kDeadlineNs / 1000000000ull));
}

static inline uint64_t mix(uint64_t value)
{
    value += 0x9E3779B97F4A7C15ull;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

static inline uint64_t *out_word(struct endpoint *self)
{
    return (uint64_t *)(self->buffer + self->data_bytes);
}

static inline volatile uint64_t *in_word(struct endpoint *self)
{
    return (volatile uint64_t *)(self->buffer + self->data_bytes + kInOffset);
}

/* Page-aligned memory of the process; huge pages as numpy asks for them. */
static uint8_t *private_buffer(size_t nbytes)
{
    size_t huge = 2u << 20;
    uint8_t *raw = mmap(NULL, nbytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        fail("mmap of %zu bytes: %s", nbytes, strerror(errno));
    uint8_t *buffer = (uint8_t *)(((uintptr_t)raw + huge - 1) & ~(uintptr_t)(huge - 1));
    madvise(buffer, nbytes, MADV_HUGEPAGE);
    memset(buffer, 0, nbytes);
    return buffer;
}

struct keyed_slot {
    uint64_t key;
    uint32_t slot;
};

static int by_key(const void *left, const void *right)
{
    uint64_t a = ((const struct keyed_slot *)left)->key, b = ((const struct keyed_slot *)right)->key;
    return (a > b) - (a < b);
}

static uint32_t *slot_order(uint64_t seed, uint64_t salt, uint64_t num_slots)
{
    struct keyed_slot *keyed = malloc(num_slots * sizeof *keyed);
    uint32_t *order = malloc(num_slots * sizeof *order);
    if (!keyed || !order)
        fail("no memory for %llu slots", (unsigned long long)num_slots);
    uint64_t start = mix(seed ^ salt);
    for (uint64_t i = 0; i < num_slots; ++i)
        keyed[i] = (struct keyed_slot){mix(start + i), (uint32_t)i};
    qsort(keyed, num_slots, sizeof *keyed, by_key);
    for (uint64_t i = 0; i < num_slots; ++i)
        order[i] = keyed[i].slot;
    free(keyed);
    return order;
}

static void fill(struct endpoint *self, uint64_t seed)
{
    uint64_t start = mix(seed), *words = (uint64_t *)self->buffer;
    if (self->is_source)
        for (uint64_t i = 0; i < self->data_bytes / 8; ++i)
            words[i] = mix(start + i);
    else
        memset(self->buffer, kClearByte, self->data_bytes);
    memset(self->buffer + self->data_bytes, 0, kMailBytes);
}

static void run_bulk(struct endpoint *self, const struct contender *with, const struct load *load,
                     uint64_t *durations)
{
    uint64_t num_slots = load->span_bytes / load->size_bytes;
    uint64_t total = load->num_calls + load->num_warmup;
    uint32_t *source = NULL, *target = NULL;
    if (load->operation == kPages) {
        source = slot_order(load->seed, kSourceSalt, num_slots);
        target = slot_order(load->seed, kTargetSalt, num_slots);
    }
    for (uint64_t call = 0; call < total; ++call) {
        uint64_t first = call * load->num_pages % num_slots;
        uint64_t start = now_ns();
        if (load->operation == kWrite)
            with->write(self, call % num_slots * load->size_bytes, load->size_bytes);
        else
            with->write_pages(self, source + first, target + first, load->num_pages, load->size_bytes);
        durations[call] = now_ns() - start;
    }
    free(source);
    free(target);
    with->announce(self);
}

static void await_word(struct endpoint *self, const struct contender *with, const struct load *load,
                       uint64_t word)
{
    struct patience patience = {0};
    if (load->operation == kNotify) {
        with->await_notification(self, word);
        return;
    }
    while (*in_word(self) != word) {
        if (with->poll_flag)
            with->poll_flag(self);
        wait_more(&patience, "a word");
    }
}

static void run_bounce(struct endpoint *self, const struct contender *with, const struct load *load,
                       uint64_t *durations)
{
    void (*send)(struct endpoint *) = load->operation == kNotify ? with->notify : with->flag;
    if (!send)
        fail("this contender does not measure the operation");
    self->bad_words = 0;
    for (uint64_t call = 0; call < load->num_calls + load->num_warmup; ++call) {
        uint64_t word = mix(load->seed + call);
        if (self->is_source) {
            *out_word(self) = word;
            uint64_t start = now_ns();
            send(self);
            await_word(self, with, load, word);
            durations[call] = (now_ns() - start) / 2;
            self->bad_words += *in_word(self) != word;
        } else {
            await_word(self, with, load, word);
            uint64_t received = *in_word(self);
            *out_word(self) = received;
            send(self);
            self->bad_words += received != word;
        }
    }
}

static void run(struct endpoint *self, const struct contender *with, const struct load *load)
{
    uint64_t total = load->num_calls + load->num_warmup;
    uint64_t *durations = calloc(total, sizeof *durations);
    if (!durations)
        fail("no memory for %llu durations", (unsigned long long)total);
    if (load->operation == kNotify || load->operation == kFlag)
        run_bounce(self, with, load, durations);
    else if (self->is_source)
        run_bulk(self, with, load, durations);
    else
        with->await_announcement(self, load);
    fprintf(self->answers, "ok");
    for (uint64_t call = load->num_warmup; self->is_source && call < total; ++call)
        fprintf(self->answers, " %llu", (unsigned long long)durations[call]);
    fprintf(self->answers, "\n");
    free(durations);
}

/* Bytes of the data area that differ from what `load` must have left; see workload.py. */
static uint64_t num_wrong_bytes(struct endpoint *self, const struct load *load)
{
    if (load->operation == kNotify || load->operation == kFlag)
        return self->bad_words;
    if (self->is_source)
        return 0;
    uint64_t num_slots = load->span_bytes / load->size_bytes, start = mix(load->seed);
    uint64_t total = load->num_calls + load->num_warmup;
    uint64_t num_moved = load->operation == kPages ? total * load->num_pages : total;
    num_moved = num_moved < num_slots ? num_moved : num_slots;
    uint64_t *origin = malloc(num_slots * sizeof *origin); /* slot + 1 of the source, 0: untouched */
    uint32_t *source = slot_order(load->seed, kSourceSalt, num_slots);
    uint32_t *target = slot_order(load->seed, kTargetSalt, num_slots);
    memset(origin, 0, num_slots * sizeof *origin);
    for (uint64_t i = 0; i < num_moved; ++i)
        if (load->operation == kPages)
            origin[target[i]] = (uint64_t)source[i] + 1;
        else
            origin[i] = i + 1;
    uint64_t num_wrong = 0, words = load->size_bytes / 8, clear;
    memset(&clear, kClearByte, sizeof clear);
    for (uint64_t slot = 0; slot < num_slots; ++slot)
        for (uint64_t i = 0; i < words; ++i) {
            uint64_t want = origin[slot] ? mix(start + (origin[slot] - 1) * words + i) : clear, have;
            memcpy(&have, self->buffer + slot * load->size_bytes + i * 8, sizeof have);
            for (uint64_t differ = want ^ have; differ; differ >>= 8)
                num_wrong += (differ & 0xff) != 0;
        }
    for (uint64_t at = load->span_bytes; at < self->data_bytes; ++at)
        num_wrong += self->buffer[at] != kClearByte;
    free(origin);
    free(source);
    free(target);
    return num_wrong;
}

static struct load parse_load(const char *text)
{
    struct load load;
    char name[16];
    unsigned long long field[6];
    if (sscanf(text, "%15s %llu %llu %llu %llu %llu %llu", name, &field[0], &field[1], &field[2],
               &field[3], &field[4], &field[5]) != 7)
        fail("cannot read the load %s", text);
    load = (struct load){kWrite, field[0], field[1], field[2], field[3], field[4], field[5]};
    if (!strcmp(name, "pages"))
        load.operation = kPages;
    else if (!strcmp(name, "notify"))
        load.operation = kNotify;
    else if (!strcmp(name, "flag"))
        load.operation = kFlag;
    else if (strcmp(name, "write"))
        fail("unknown operation %s", name);
    return load;
}

static void answer_setup(struct endpoint *self, const struct contender *with, const char *arguments)
{
    static uint8_t blob[1 << 16];
    char role[16];
    unsigned long long data_bytes;
    if (sscanf(arguments, "%15s %llu", role, &data_bytes) != 2)
        fail("cannot read setup %s", arguments);
    self->is_source = !strcmp(role, "source");
    self->data_bytes = data_bytes;
    size_t nbytes = with->setup(self, blob, sizeof blob);
    fprintf(self->answers, "ok ");
    for (size_t i = 0; i < nbytes; ++i)
        fprintf(self->answers, "%02x", blob[i]);
    fprintf(self->answers, "\n");
}

static void answer_connect(struct endpoint *self, const struct contender *with, const char *hex)
{
    static uint8_t blob[1 << 16];
    size_t nbytes = strspn(hex, "0123456789abcdef") / 2;
    for (size_t i = 0; i < nbytes && i < sizeof blob; ++i) {
        unsigned value = 0;
        if (sscanf(hex + 2 * i, "%2x", &value) != 1)
            fail("cannot read the peer's blob");
        blob[i] = (uint8_t)value;
    }
    fprintf(self->answers, "ok %s\n", with->connect(self, blob, nbytes));
}

/* Returns the next command in `line`, progressing the contender meanwhile; false at the end. */
static bool next_line(struct endpoint *self, const struct contender *with, char **line, size_t *capacity)
{
    struct pollfd ready = {.fd = 0, .events = POLLIN};
    while (with->progress && poll(&ready, 1, 0) == 0)
        for (int i = 0; i < 256; ++i)
            with->progress(self);
    return getline(line, capacity, stdin) > 0;
}

static int serve(const struct contender *with)
{
    struct endpoint *self = &endpoint;
    char *line = NULL;
    size_t capacity = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdin, NULL, _IONBF, 0);
    self->answers = fdopen(dup(1), "w");
    dup2(2, 1); /* a library that prints must not corrupt the answers */
    while (next_line(self, with, &line, &capacity)) {
        char *arguments = strpbrk(line, " \n");
        if (arguments)
            *arguments++ = '\0';
        if (!strcmp(line, "quit"))
            break;
        if (!strcmp(line, "version"))
            fprintf(self->answers, "ok %s\n", with->version());
        else if (!strcmp(line, "setup"))
            answer_setup(self, with, arguments);
        else if (!strcmp(line, "connect"))
            answer_connect(self, with, arguments);
        else if (!strcmp(line, "fill"))
            fill(self, strtoull(arguments, NULL, 10)), fprintf(self->answers, "ok\n");
        else if (!strcmp(line, "run")) {
            struct load load = parse_load(arguments);
            run(self, with, &load);
        } else if (!strcmp(line, "verify")) {
            struct load load = parse_load(arguments);
            fprintf(self->answers, "ok %llu\n", (unsigned long long)num_wrong_bytes(self, &load));
        } else
            fail("unknown command %s", line);
        fflush(self->answers);
    }
    _exit(0);
}

#endif
