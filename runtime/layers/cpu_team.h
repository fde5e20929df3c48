// Who computes a pass together: the threads of a rank, each with a part of every stage, and the ranks of a host, whose
// partial results are added up.
//
//     stage ── meet ── stage ── meet ──> partial sums ── add_up ──> sums, the same on every rank
//
// Whoever waits spins for a while, since the others are a microsecond away, and then sleeps: a thread that spins on
// would keep from its core the very one it waits for.

#pragma once

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <sched.h>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto AWAKE = std::chrono::microseconds(50);      // what somebody in the midst of a pass spins
constexpr auto READY = std::chrono::microseconds(300);     // and a thread without work
constexpr auto LOOK_UP = std::chrono::milliseconds(100);   // how often a sleeper looks for itself

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

// A number that only grows, modulo 2^32, and those that wait for it; in memory of one process or of several.
struct alignas(64) Count {
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> asleep;

    bool reached(uint32_t wanted) const { return int32_t(value.load(std::memory_order_seq_cst) - wanted) >= 0; }

    void raise(uint32_t to) {
        value.store(to, std::memory_order_seq_cst);
#if defined(__linux__)
        if (asleep.load(std::memory_order_seq_cst)) syscall(SYS_futex, &value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
    }

    // False where it was not reached in time.
    bool wait(uint32_t wanted, Clock::duration awake, double timeout_s = 1e9) {
        const auto start = Clock::now();
        while (true) {
            for (int spins = 0; spins < 64; spins++) {
                if (reached(wanted)) return true;
                relax();
            }
            const auto waited = Clock::now() - start;
            if (waited >= awake) sleep(wanted);
            if (std::chrono::duration<double>(waited).count() > timeout_s) return reached(wanted);
        }
    }

  private:
    void sleep(uint32_t wanted) {
#if defined(__linux__)
        asleep.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t now = value.load(std::memory_order_seq_cst);
        const timespec most{0, std::chrono::nanoseconds(LOOK_UP).count()};
        if (int32_t(now - wanted) < 0) syscall(SYS_futex, &value, FUTEX_WAIT, now, &most, nullptr, 0);
        asleep.fetch_sub(1, std::memory_order_seq_cst);
#else
        sched_yield();
#endif
    }
};

// The ranks of a host. All of them call `add_up` in the same order with the same counts. The region, which all have
// mapped, begins with a `Count` per rank, the sums it has put down; then come two slots of `capacity` floats per rank,
// used in turn: whoever puts the next but one down knows that all others have read this one, for they have put the next
// one down.
struct Ranks {
    char *region;
    int32_t rank, size;
    int64_t capacity;
    int64_t turn;  // sums so far
    double timeout_s;
    int32_t failed;  // a rank did not come in time, and none is waited for any more
};

namespace {

Count &count_of(const Ranks &ranks, int rank) { return *(Count *)(ranks.region + sizeof(Count) * rank); }

float *slot_of(const Ranks &ranks, int64_t turn, int rank) {
    return (float *)(ranks.region + sizeof(Count) * ranks.size) + ((turn & 1) * ranks.size + rank) * ranks.capacity;
}

// values [count] of all ranks, added up in the order of their ranks
inline void add_up(Ranks &ranks, float *values, int64_t count) {
    for (; count > 0 && !ranks.failed; values += ranks.capacity, count -= ranks.capacity) {
        const int64_t part = count < ranks.capacity ? count : ranks.capacity, turn = ranks.turn++;
        std::memcpy(slot_of(ranks, turn, ranks.rank), values, part * sizeof(float));
        count_of(ranks, ranks.rank).raise(uint32_t(turn + 1));
        for (int rank = 0; rank < ranks.size; rank++) {
            if (!count_of(ranks, rank).wait(uint32_t(turn + 1), AWAKE, ranks.timeout_s)) {
                ranks.failed = 1;
                return;
            }
            const float *theirs = slot_of(ranks, turn, rank);
            if (rank == 0)
                std::memcpy(values, theirs, part * sizeof(float));
            else
                for (int64_t i = 0; i < part; i++) values[i] += theirs[i];
        }
    }
}

}  // namespace

// The threads of a rank: whoever calls `run`, and those that wait for it.
class Team {
  public:
    explicit Team(int size) : size(size) {
        for (int index = 1; index < size; index++) others.emplace_back([this, index] { serve(index); });
    }

    ~Team() {
        ends.store(true);
        calls.raise(calls.value.load() + 1);
        for (std::thread &each : others) each.join();
    }

    // `part(index)` on every thread. Returns when all are done.
    template <typename Part>
    void run(Part &&part) {
        if (size == 1) return part(0);
        call = [](void *given, int index) { (*(std::remove_reference_t<Part> *)given)(index); };
        given = (void *)&part;
        calls.raise(calls.value.load(std::memory_order_relaxed) + 1);
        part(0);
        meet();
    }

    // Every thread waits here for the others.
    void meet() {
        if (size == 1) return;
        const uint32_t next = meetings.value.load(std::memory_order_relaxed) + 1;
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            meetings.raise(next);
        } else {
            meetings.wait(next, AWAKE);
        }
    }

    const int size;

  private:
    void serve(int index) {
        for (uint32_t next = 1;; next++) {
            calls.wait(next, READY);
            if (ends.load()) return;
            call(given, index);
            meet();
        }
    }

    Count calls{}, meetings{};
    alignas(64) std::atomic<int> arrived{0};
    std::atomic<bool> ends{false};
    void (*call)(void *, int) = nullptr;
    void *given = nullptr;
    std::vector<std::thread> others;
};

namespace {

// One of a team, and the part of `count` things that is its own, in multiples of `whole`.
struct Member {
    Team &team;
    int index;

    void meet() const { team.meet(); }

    struct Part {
        int from, to;
    };
    Part part(int count, int whole = 1) const {
        const int64_t wholes = (count + whole - 1) / whole;
        const auto at = [&](int i) { return int(std::min<int64_t>(count, wholes * i / team.size * whole)); };
        return {at(index), at(index + 1)};
    }
};

}  // namespace
