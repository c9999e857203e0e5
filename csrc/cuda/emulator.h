// A stand-in for the GPU, for tests: every thread of a cluster is a fiber, and what runs next is chosen at
// random from a seed. cuda/ptx_host.h has the instructions that it knows; plain loads and stores are the
// host's.
//
// A protocol fault shows as a wrong number or as an Error: a deadlock, with what each group waits for; a
// write that reaches a CTA after its exit; an mbarrier that was not initialised, not fenced, overwritten or
// arrived at too often; lanes of a warp in different instructions; addresses out of bounds. Shared memory
// starts as NaN. Built with -fsanitize=thread, also accesses that only happened to come in the right order
// are reported, with one gap: every warp-wide instruction orders the lanes' accesses, where only sync_warp
// promises it.
//
// Stricter than the device: no thread may return while others of its CTA or cluster go on to a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/watch.h"

namespace torchrnn {
namespace emulator {

using Site = std::source_location;

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

constexpr int kLanes = 32;
constexpr size_t kStack = 128 * 1024;

struct Cta;

struct Fiber {
  Cta* cta;
  int thread;
  watch::Thread watched;
  ucontext_t context = {};
  std::string waits_for = {};
  bool returned = false;

  int warp() const { return thread / kLanes; }
  int lane() const { return thread % kLanes; }
};

// Where a fixed number of threads wait for the last of them.
struct Meeting {
  size_t size;
  const char* what = nullptr;
  Site site = {};
  std::vector<Fiber*> waiting = {};
  void* operands[kLanes] = {};  // of a warp's lanes
  uint64_t round = 0;
  watch::Clock clock = {};
};

struct Mbarrier {
  uint32_t arrivals;  // per phase
  uint32_t pending;   // of them, what this phase still waits for
  int64_t bytes;      // likewise; below zero while a phase has got bytes that are not yet expected
  uint64_t phase;     // how many are over
  int owner;          // the thread that initialised it
  bool fenced;        // and made it known to the cluster
  std::vector<Fiber*> waiting = {};
  watch::Clock clock = {};
};

struct Cta {
  int x, y, rank;
  int running;  // threads that have not returned
  std::unique_ptr<char, void (*)(void*)> memory;
  size_t memory_size;
  Meeting threads;
  std::vector<Meeting> warps;
  std::unordered_map<const void*, Mbarrier> mbarriers = {};
  // How eager the CTA, each of its warps and what is on its way to it are; redrawn now and then, so that one
  // runs far ahead of another.
  uint32_t eager = 0, eager_arrivals = 0;
  std::vector<uint32_t> eager_warps = {};
};

// A store_async on its way.
struct Delivery {
  Fiber* from;
  Cta* to;
  size_t offset, words, mbarrier;  // both places as offsets in shared memory
  uint32_t value[4];
};

// What can happen next: the fiber goes on, or, if there is none, the delivery arrives. The highest key does.
struct Event {
  uint64_t key;
  Fiber* fiber;
  Delivery delivery;
  bool operator<(const Event& other) const { return key < other.key; }
};

// An mbarrier's place in shared memory holds this, to see that nothing is written over it.
constexpr uint64_t kMbarrierMark = 0x6D62617272696572;

class Cluster {
 public:
  Cluster(int first_x, int y, int size, int threads, size_t shared_bytes, uint64_t seed,
          const std::function<void()>& kernel)
      : kernel_(kernel), random_(seed), stacks_(new char[size_t(size) * threads * kStack]) {
    for (int rank = 0; rank < size; ++rank) add_cta(first_x + rank, y, rank, size_t(threads), shared_bytes);
    together_.size = fibers_.size();
    for (auto& fiber : fibers_) wake(fiber.get());
  }

  ~Cluster() {
    for (auto& fiber : fibers_) watch::join(fiber->watched);
  }

  void run();

  Fiber& self() { return *running_; }
  Meeting& own_warp() { return self().cta->warps[self().warp()]; }
  Meeting& own_cta() { return self().cta->threads; }
  Meeting& all() { return together_; }
  size_t size() const { return ctas_.size(); }

  // Waits until all of the meeting have called this; the last of them first does `together` for all.
  template <typename Together>
  void meet(Meeting& meeting, const char* what, const Site& site, Together together);

  void yield_sometimes() {
    if (random_() % 4 != 0) return;
    wake(running_);
    suspend();
  }

  void init(uint64_t* address, uint32_t arrivals) {
    offset(address, sizeof *address);
    const Mbarrier fresh{arrivals, arrivals, 0, 0, self().thread, false};
    if (!self().cta->mbarriers.emplace(address, fresh).second) throw Error("mbarrier_init: twice");
    *address = kMbarrierMark;
  }

  void fence() {
    for (auto& [address, mbarrier] : self().cta->mbarriers) {
      if (mbarrier.owner == self().thread) mbarrier.fenced = true;
    }
  }

  void expect(uint64_t* address, uint32_t bytes) {
    Mbarrier& mbarrier = find(*self().cta, address);
    if (mbarrier.pending == 0) throw Error("mbarrier_expect: more arrivals in a phase than it waits for");
    mbarrier.clock.release(mbarrier.phase);
    --mbarrier.pending;
    count(mbarrier, bytes);
  }

  void wait(uint64_t* address, uint32_t parity, const Site& site) {
    Mbarrier& mbarrier = find(*self().cta, address);
    // In a loop, as the device polls: whoever comes so late that the next phase is over too waits again.
    while ((mbarrier.phase & 1) == parity) {
      mbarrier.waiting.push_back(running_);
      block("mbarrier_wait(shared memory + " + std::to_string(offset(address, sizeof *address)) +
                ", parity " + std::to_string(parity) + ")",
            site);
    }
    mbarrier.clock.acquire(parity);
  }

  void send(const void* local, int rank, const uint32_t* value, size_t words, const uint64_t* mbarrier) {
    if (rank < 0 || size_t(rank) >= size()) throw Error("store_async: no such CTA in the cluster");
    Cta& to = *ctas_[rank];
    Event event{key(to.eager_arrivals), nullptr, {}};
    event.delivery = {running_, &to, offset(local, words * 4), words, offset(mbarrier, sizeof *mbarrier), {}};
    std::copy_n(value, words, event.delivery.value);
    events_.push(event);
  }

  // Where `bytes` at the address are in the caller's shared memory, where they must be, and aligned.
  size_t offset(const void* address, size_t bytes) {
    const Cta& cta = *self().cta;
    const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(cta.memory.get());
    if (offset % bytes != 0 || offset >= cta.memory_size || offset + bytes > cta.memory_size)
      throw Error("an address is not in shared memory or not aligned to " + std::to_string(bytes) + " bytes");
    return offset;
  }

 private:
  void add_cta(int x, int y, int rank, size_t threads, size_t shared_bytes);
  static void enter();
  void deliver(const Delivery& delivery);
  void redraw();  // who is eager
  void check_for_deadlock() const;

  uint64_t key(uint64_t eager) { return eager + random_() % 0x10000; }

  void wake(Fiber* fiber) {
    events_.push({key(fiber->cta->eager + fiber->cta->eager_warps[fiber->warp()]), fiber, {}});
  }

  void suspend() {
    Fiber& fiber = self();
    const char mark = 0;
    if (&mark < static_cast<char*>(fiber.context.uc_stack.ss_sp) + kStack / 8)
      throw Error("kStack is too small");
    watch::become(watched_);
    swapcontext(&fiber.context, &scheduler_);
  }

  void block(std::string what, const Site& site) {
    const std::string file = site.file_name();
    self().waits_for =
        std::move(what) + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
    suspend();
  }

  Mbarrier& find(Cta& cta, const uint64_t* address) {
    const auto found = cta.mbarriers.find(address);
    if (found == cta.mbarriers.end()) throw Error("an mbarrier is used before mbarrier_init");
    if (*address != kMbarrierMark) throw Error("an mbarrier was overwritten");
    return found->second;
  }

  // Expects bytes, or fewer of them, and ends the phase if there is nothing left that it waits for.
  void count(Mbarrier& mbarrier, int64_t bytes) {
    mbarrier.bytes += bytes;
    if (std::abs(mbarrier.bytes) >= 1 << 20) throw Error("an mbarrier counts more than 2^20 - 1 bytes");
    if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.arrivals;
    for (Fiber* fiber : mbarrier.waiting) wake(fiber);
    mbarrier.waiting.clear();
  }

  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  std::unique_ptr<char[]> stacks_;
  std::vector<std::unique_ptr<Cta>> ctas_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Meeting together_{};
  std::priority_queue<Event> events_;
  Fiber* running_ = nullptr;
  ucontext_t scheduler_;
  watch::Thread watched_ = watch::self();
  std::exception_ptr error_;
};

inline Cluster* cluster = nullptr;  // that runs

inline void Cluster::add_cta(int x, int y, int rank, size_t threads, size_t shared_bytes) {
  shared_bytes = (shared_bytes + 1023) / 1024 * 1024;
  char* memory = static_cast<char*>(aligned_alloc(1024, std::max<size_t>(shared_bytes, 1024)));
  memset(memory, 0xFF, shared_bytes);  // NaN in every type
  ctas_.emplace_back(new Cta{x, y, rank, int(threads), {memory, free}, shared_bytes, {threads}, {}});
  Cta& cta = *ctas_.back();
  cta.warps.assign(threads / kLanes, Meeting{kLanes});
  cta.eager_warps.assign(threads / kLanes, 0);
  for (size_t warp = 0; warp < cta.warps.size(); ++warp) redraw();
  for (size_t thread = 0; thread < threads; ++thread) {
    fibers_.emplace_back(new Fiber{&cta, int(thread), watch::create()});
    ucontext_t& context = fibers_.back()->context;
    getcontext(&context);
    context.uc_stack.ss_sp = &stacks_[(fibers_.size() - 1) * kStack];
    context.uc_stack.ss_size = kStack;
    makecontext(&context, enter, 0);
  }
}

inline void Cluster::redraw() {
  Cta& cta = *ctas_[random_() % ctas_.size()];
  cta.eager = random_() % 0x20000;
  cta.eager_arrivals = random_() % 0x40000;
  cta.eager_warps[random_() % cta.eager_warps.size()] = random_() % 0x20000;
}

// A fiber's whole life.
inline void Cluster::enter() {
  watch::on();
  try {
    cluster->kernel_();
  } catch (...) {
    cluster->error_ = std::current_exception();
  }
  watch::off();
  cluster->self().returned = true;
  --cluster->self().cta->running;
  cluster->suspend();
}

inline void Cluster::run() {
  while (!events_.empty()) {
    if (random_() % 128 == 0) redraw();
    const Event event = events_.top();
    events_.pop();
    if (event.fiber == nullptr) {
      deliver(event.delivery);
    } else {
      running_ = event.fiber;
      watch::become(running_->watched);
      swapcontext(&scheduler_, &running_->context);
      if (error_) std::rethrow_exception(error_);
    }
  }
  check_for_deadlock();
}

inline void Cluster::deliver(const Delivery& delivery) {
  Cta& to = *delivery.to;
  if (to.running == 0) throw Error("a store_async arrives after the exit of CTA " + std::to_string(to.rank));
  const auto at = [&](size_t offset) { return reinterpret_cast<uint64_t*>(to.memory.get() + offset); };
  Mbarrier& mbarrier = find(to, at(delivery.mbarrier));
  if (!mbarrier.fenced) throw Error("a store_async meets an mbarrier without fence_mbarrier_init");
  // As an access of the thread that sent it, and ordered before what follows the wait.
  watch::become(delivery.from->watched);
  watch::on();
  memcpy(at(delivery.offset), delivery.value, delivery.words * 4);
  watch::off();
  mbarrier.clock.release(mbarrier.phase);
  watch::become(watched_);
  count(mbarrier, -int64_t(delivery.words) * 4);
}

inline void Cluster::check_for_deadlock() const {
  std::map<std::string, int> groups;
  bool all_returned = true;
  for (const auto& fiber : fibers_) {
    const std::string state = fiber->returned ? "have returned" : "wait for " + fiber->waits_for;
    ++groups["CTA " + std::to_string(fiber->cta->rank) + " " + state];
    all_returned &= fiber->returned;
  }
  if (all_returned) return;
  std::string message = "deadlock";
  for (const auto& [group, threads] : groups)
    message += "; " + std::to_string(threads) + " threads of " + group;
  throw Error(message);
}

template <typename Together>
void Cluster::meet(Meeting& meeting, const char* what, const Site& site, Together together) {
  if (meeting.waiting.empty()) {
    meeting.what = what;
    meeting.site = site;
  } else if (strcmp(meeting.what, what) != 0 || meeting.site.line() != site.line() ||
             meeting.site.column() != site.column() ||
             strcmp(meeting.site.file_name(), site.file_name()) != 0) {
    throw Error(std::string(meeting.what) + " at line " + std::to_string(meeting.site.line()) + " meets " +
                what + " at line " + std::to_string(site.line()));
  }
  const uint64_t round = meeting.round;
  meeting.clock.release(round);
  if (meeting.waiting.size() + 1 < meeting.size) {
    meeting.waiting.push_back(running_);
    block(what, site);
  } else {
    together();
    for (Fiber* fiber : meeting.waiting) wake(fiber);
    meeting.waiting.clear();
    ++meeting.round;
  }
  meeting.clock.acquire(round);
}

// Runs the kernel in each thread of the grid, one cluster after the other in random order, as clusters do not
// wait for each other.
inline void launch(int grid_x, int grid_y, int cluster_size, int threads, size_t shared_bytes, uint64_t seed,
                   const std::function<void()>& kernel) {
  if (grid_x % cluster_size != 0 || threads % kLanes != 0)
    throw Error("launch: a grid of whole clusters and a block of whole warps are needed");
  const watch::Off off;
  std::mt19937_64 random(seed);
  std::vector<std::pair<int, int>> order;
  for (int x = 0; x < grid_x; x += cluster_size) {
    for (int y = 0; y < grid_y; ++y) order.emplace_back(x, y);
  }
  std::shuffle(order.begin(), order.end(), random);
  for (const auto& [x, y] : order) {
    Cluster next(x, y, cluster_size, threads, shared_bytes, random(), kernel);
    cluster = &next;
    next.run();
  }
}

}  // namespace emulator
}  // namespace torchrnn
