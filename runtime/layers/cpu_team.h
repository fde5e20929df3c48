// Who computes a pass together: the threads of a rank, each with a part of every stage, and the ranks of a host, whose
// partial results are added up.
//
//     stage ── meet ── stage ── meet ──> partial sums ── add_up ──> sums, the same on every rank
//
// Whoever waits spins, since the others are a microsecond away, and then lets others have the processor.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <sched.h>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS = 4096;  // of a thread that waits for another, before it yields
constexpr auto AWAKE = std::chrono::microseconds(300);  // what a thread without work spins, before it sleeps

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// False where it never came to be: `late` says when to give up, and is asked now and then.
template <typename Done, typename Late>
bool wait_until(Done &&done, Late &&late) {
    for (int spins = 0; !done(); spins++) {
        if (spins < SPINS) {
            relax();
        } else {
            if (spins % 1024 == 0 && late()) return false;
            sched_yield();
        }
    }
    return true;
}

}  // namespace

// The ranks of a host. All of them call `add_up` in the same order with the same counts. The region, which all have
// mapped, begins with a line of 64 bytes per rank, the number of sums it has put down; then come two slots of `capacity`
// floats per rank, used in turn: whoever puts the next but one down knows that all others have read this one, for they
// have put the next one down.
struct Ranks {
    char *region;  // null where a rank is alone
    int32_t rank, size;
    int64_t capacity;
    int64_t turn;  // sums so far
    double timeout_s;
    int32_t failed;  // a rank did not come in time, and none is waited for any more
};

namespace {

std::atomic<int64_t> &turn_of(const Ranks &ranks, int rank) { return *(std::atomic<int64_t> *)(ranks.region + 64 * rank); }

float *slot_of(const Ranks &ranks, int64_t turn, int rank) {
    return (float *)(ranks.region + 64 * ranks.size) + ((turn & 1) * ranks.size + rank) * ranks.capacity;
}

// values [count] of all ranks, added up in the order of their ranks
inline void add_up(Ranks &ranks, float *values, int64_t count) {
    for (; count > 0 && !ranks.failed; values += ranks.capacity, count -= ranks.capacity) {
        const int64_t part = count < ranks.capacity ? count : ranks.capacity, turn = ranks.turn++;
        std::memcpy(slot_of(ranks, turn, ranks.rank), values, part * sizeof(float));
        turn_of(ranks, ranks.rank).store(turn + 1, std::memory_order_release);
        const auto start = std::chrono::steady_clock::now();
        for (int rank = 0; rank < ranks.size; rank++) {
            const auto there = [&] { return turn_of(ranks, rank).load(std::memory_order_acquire) > turn; };
            const auto late = [&] {
                return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > ranks.timeout_s;
            };
            if (!wait_until(there, late)) {
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
        {
            std::lock_guard<std::mutex> held(mutex);
            work.fetch_add(1);
        }
        changed.notify_all();
        for (std::thread &each : others) each.join();
    }

    // `part(index)` on every thread. Returns when all are done.
    template <typename Part>
    void run(Part &&part) {
        if (size == 1) return part(0);
        call = [](void *given, int index) { (*(std::remove_reference_t<Part> *)given)(index); };
        given = (void *)&part;
        left.store(size - 1, std::memory_order_relaxed);
        work.fetch_add(1, std::memory_order_seq_cst);
        if (asleep.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> held(mutex);
            changed.notify_all();
        }
        part(0);
        wait_until([this] { return left.load(std::memory_order_acquire) == 0; }, [] { return false; });
    }

    // Every thread waits here for the others.
    void meet() {
        if (size == 1) return;
        const uint32_t now = meetings.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            meetings.store(now + 1, std::memory_order_release);
        } else {
            wait_until([&] { return meetings.load(std::memory_order_acquire) != now; }, [] { return false; });
        }
    }

    const int size;

  private:
    void serve(int index) {
        for (uint64_t done = 0;; done++) {
            await_work(done);
            if (ends.load()) return;
            call(given, index);
            left.fetch_sub(1, std::memory_order_release);
        }
    }

    void await_work(uint64_t done) {
        const auto there = [&] { return work.load(std::memory_order_seq_cst) > done; };
        const auto start = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - start < AWAKE)
            for (int spins = 0; spins < 64; spins++) {
                if (there()) return;
                relax();
            }
        std::unique_lock<std::mutex> held(mutex);
        asleep.fetch_add(1, std::memory_order_seq_cst);
        changed.wait(held, there);
        asleep.fetch_sub(1, std::memory_order_seq_cst);
    }

    alignas(64) std::atomic<uint64_t> work{0};
    alignas(64) std::atomic<int> left{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> meetings{0};
    alignas(64) std::atomic<int> asleep{0};
    std::atomic<bool> ends{false};
    void (*call)(void *, int) = nullptr;
    void *given = nullptr;
    std::mutex mutex;
    std::condition_variable changed;
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
