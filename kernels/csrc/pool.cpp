// The helpers behind pool.h. They are started on first need and live as long as the process.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

constexpr int64_t closed = int64_t(1) << 32; // in `state`: nobody may join any more
constexpr int64_t spins = 2000;              // looks for work before a helper gives its core away between looks
constexpr int64_t yields = 200;              // looks for work before it goes to sleep; some hundred microseconds

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    void run(int64_t tasks, int64_t threads, void (*work)(const void *, int64_t), const void *context) {
        std::unique_lock<std::mutex> alone(owner_, std::try_to_lock);
        if (!alone.owns_lock()) {
            for (int64_t i = 0; i < tasks; ++i) work(context, i);
            return;
        }
        while (num_helpers_ < threads - 1) std::thread([this, id = num_helpers_++] { help(id); }).detach();
        work_ = work, context_ = context, tasks_ = tasks, wanted_ = threads - 1;
        next_.store(0, std::memory_order_relaxed);
        state_.fetch_and(~closed); // open: what was written above is seen by whoever joins
        calls_.fetch_add(1);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> guard(bed_);
            wake_.notify_all();
        }
        take();
        state_.fetch_or(closed);
        for (int64_t look = 0; state_.load() != closed; ++look)
            if (look < spins)
                relax();
            else
                std::this_thread::yield(); // the helper is off its core: perhaps this one is what it waits for
    }

  private:
    void take() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) work_(context_, i);
    }

    void help(int64_t id) {
        for (uint64_t seen = 0;;) {
            seen = wait(seen);
            if (!(state_.fetch_add(1) & closed) && id < wanted_) take();
            state_.fetch_sub(1);
        }
    }

    // Returns the number of calls once it is no longer `seen`.
    uint64_t wait(uint64_t seen) {
        for (int64_t look = 0; look < spins + yields; ++look) {
            if (uint64_t calls = calls_.load(); calls != seen) return calls;
            if (look < spins)
                relax();
            else
                std::this_thread::yield();
        }
        std::unique_lock<std::mutex> guard(bed_);
        sleeping_.fetch_add(1);
        wake_.wait(guard, [&] { return calls_.load() != seen; });
        sleeping_.fetch_sub(1);
        return calls_.load();
    }

    std::mutex owner_, bed_;
    std::condition_variable wake_;
    std::atomic<uint64_t> calls_{0};
    std::atomic<int64_t> state_{closed}, next_{0}, sleeping_{0}; // state_: closed, plus the helpers that are inside
    int64_t num_helpers_ = 0, tasks_ = 0, wanted_ = 0;
    void (*work_)(const void *, int64_t) = nullptr;
    const void *context_ = nullptr;
};

} // namespace

void share_tasks(int64_t tasks, int64_t threads, void (*work)(const void *, int64_t), const void *context) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t i = 0; i < tasks; ++i) work(context, i);
        return;
    }
    static Pool *pool = new Pool; // never destroyed: helpers may still look at it while the process ends
    pool->run(tasks, threads, work, context);
}
