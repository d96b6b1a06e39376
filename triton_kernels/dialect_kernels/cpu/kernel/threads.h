// One call's work on several threads.
//
// The threads of PyTorch's OpenMP runtime do the work where that is possible: they are on the CPUs
// that an engine has chosen, and they still spin after PyTorch's last operation, so that further
// threads would have to share the CPUs with them. It is not possible without such a runtime, in a
// forked process (where its threads are gone), and where all its threads are pinned to fewer CPUs
// than there are threads. Then a pool of the kernel's own threads does the work.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

#include <unistd.h>

#if defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <cstdlib>
#endif

namespace {

using Task = void (*)(const void* context, int64_t i);

// `count` tasks; any number of threads take one after another.
struct Job {
    Job(Task task, const void* context, int64_t count)
        : task(task), context(context), count(count) {}
    void take() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            task(context, i);
    }
    const Task task;
    const void* const context;
    const int64_t count;
    std::atomic<int64_t> next{0};
};

#if defined(__linux__)
struct CpuMask {
    unsigned long bits[128] = {};  // 8192 CPUs

    static CpuMask of(int thread) {  // 0: the caller; empty if the system gives none
        CpuMask mask;
        if (sched_getaffinity(thread, sizeof mask.bits, reinterpret_cast<cpu_set_t*>(mask.bits)))
            return CpuMask();
        return mask;
    }
    void add(const CpuMask& other) {
        for (size_t i = 0; i < 128; i++) bits[i] |= other.bits[i];
    }
    void remove(const CpuMask& other) {
        for (size_t i = 0; i < 128; i++) bits[i] &= ~other.bits[i];
    }
    int count() const {
        int found = 0;
        for (unsigned long word : bits) found += __builtin_popcountl(word);
        return found;
    }
};

// GOMP_parallel: calls a function on `threads` threads, the caller among them, and waits for all.
using Region = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<Region> openmp{nullptr};
std::atomic<int> openmp_owner{0};

// The CPUs of the OpenMP threads that serve the calling thread.
CpuMask cpus_of_openmp(Region region, int threads) {
    struct Found {
        std::mutex lock;
        CpuMask mask;
    } found;
    region(
        [](void* context) {
            Found& all = *static_cast<Found*>(context);
            const CpuMask own = CpuMask::of(0);
            std::lock_guard<std::mutex> one(all.lock);
            all.mask.add(own);
        },
        &found, threads, 0);
    return found.mask;
}

// The OpenMP runtime if it has a CPU for each of the threads, else null. Each calling thread finds
// out once for a number of threads.
Region openmp_for(int threads) {
    const Region region = openmp.load();
    if (!region || openmp_owner.load() != getpid()) return nullptr;
    thread_local int known = 0;
    thread_local bool serves = false;
    if (known != threads) {
        serves = cpus_of_openmp(region, threads).count() >= threads;
        known = threads;
    }
    return serves ? region : nullptr;
}

// The CPUs on which helpers may run. A new thread inherits its creator's pin, and an engine may
// have pinned that one to a single core; so helpers get the CPUs of all threads of this process.
// Where even these are fewer than `threads` (OpenMP pins the first thread early and starts the
// others late), helpers get every CPU that the system lets this process have.
CpuMask cpus_of_helpers(int threads) {
    CpuMask mask;
    DIR* tasks = opendir("/proc/self/task");
    if (!tasks) return mask;
    while (const dirent* task = readdir(tasks))
        if (const int id = std::atoi(task->d_name)) mask.add(CpuMask::of(id));
    closedir(tasks);
    if (mask.count() < threads) std::memset(mask.bits, 0xff, sizeof mask.bits);
    const CpuMask caller = CpuMask::of(0);
    if (caller.count() == 1 && mask.count() > 1) mask.remove(caller);  // the caller works there
    return mask;
}
#endif

// Threads of the kernel's own, which stay. A second OpenMP runtime instead would inherit the limits
// of the first.
class Pool {
  public:
    Pool() : owner_(getpid()) {}

    int owner() const { return owner_; }

    // Does the job on up to `threads` threads, the caller among them.
    void run(int threads, Job& job) {
        std::lock_guard<std::mutex> one_call(call_);
        grow(int(std::min<int64_t>(threads, job.count)) - 1);
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job;
            wanted_ = threads - 1;
            number_++;
        }
        wake_.notify_all();
        job.take();
        std::unique_lock<std::mutex> lock(state_);
        job_ = nullptr;  // a thread that wakes up only now finds no job
        done_.wait(lock, [&] { return active_ == 0; });
    }

  private:
    void grow(int helpers) {
        if (helpers <= size_) return;
#if defined(__linux__)
        CpuMask mask = cpus_of_helpers(helpers + 1);
#endif
        try {
            while (size_ < helpers) {
                std::thread helper([this, number = size_] { serve(number); });
#if defined(__linux__)
                pthread_setname_np(helper.native_handle(), "dialect-helper");
                if (mask.count())
                    pthread_setaffinity_np(helper.native_handle(), sizeof mask.bits,
                                           reinterpret_cast<cpu_set_t*>(mask.bits));
#endif
                helper.detach();
                size_++;
            }
        } catch (const std::system_error&) {
            // the system gives no more threads: those that exist share the work
        }
    }

    void serve(int number) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [&] { return number_ != seen; });
            seen = number_;
            if (!job_ || number >= wanted_) continue;
            Job& job = *job_;
            active_++;
            lock.unlock();
            job.take();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    const int owner_;
    std::mutex call_, state_;
    std::condition_variable wake_, done_;
    int size_ = 0;
    Job* job_ = nullptr;
    int wanted_ = 0, active_ = 0;
    uint64_t number_ = 0;  // of the job
};

// Never destroyed: its threads live as long as the process. After a fork the child has none of them
// (and perhaps a locked mutex), so it starts a new pool.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    Pool* current = the_pool.load();
    if (current && current->owner() == getpid()) return *current;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;  // another thread has just made one
    return *current;
}

// Runs work(i) for i in 0..count-1 on up to `threads` threads, the caller among them.
template <class Work>
void parallel(int threads, int64_t count, const Work& work) {
    const Task task = [](const void* context, int64_t i) {
        (*static_cast<const Work*>(context))(i);
    };
    Job job(task, &work, count);
    if (threads <= 1 || count <= 1) return job.take();
#if defined(__linux__)
    if (const Region region = openmp_for(threads))
        return region([](void* all) { static_cast<Job*>(all)->take(); }, &job, threads, 0);
#endif
    pool().run(threads, job);
}

}  // namespace
