// The world around a ring of kernels, for Verilator's model of one: clock, AXI4 memories, links, the AXI4-Lite host.
//
// Everything happens in cycles of the one clock. In each, inputs are set from what the models know, combinational logic
// settles, transfers (valid and ready) are noted, and the clock rises. A model's state of one cycle decides its inputs
// of the next, so no path leads through it. Behind `extern "C"` is what typebar.hw.native.model calls.
#include "Vtop.h"
#include "verilated.h"
#if defined(TRACE_FST)
#include "verilated_fst_c.h"
using Trace = VerilatedFstC;
#elif defined(TRACE_VCD)
#include "verilated_vcd_c.h"
using Trace = VerilatedVcdC;
#endif

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

// Pointers to the members of Vtop, by role; "ports.h", written for each machine, fills them in.
struct ReadPins {
    CData *arvalid, *arready, *arlen;
    QData *araddr;
    CData *rvalid, *rready, *rresp, *rlast;
    void *rdata;
};
struct WritePins {
    CData *awvalid, *awready, *awlen;
    QData *awaddr;
    CData *wvalid, *wready, *wlast;
    void *wdata, *wstrb;
    CData *bvalid, *bready, *bresp;
};
struct MemoryPins {
    ReadPins read;
    WritePins write;
};
struct LinkPins {
    CData *valid, *ready, *last, *credit;
    void *data;
    IData *user;
};
struct DirectionPins {
    LinkPins out, in;
};
struct HostPins {
    CData *awvalid, *awready, *wvalid, *wready, *wstrb, *bvalid, *bready, *bresp;
    CData *arvalid, *arready, *rvalid, *rready, *rresp;
    SData *awaddr, *araddr;
    IData *wdata, *rdata;
};
#include "ports.h"  // CHANNELS, CHANNEL_BYTES, ROW_BYTES, bind_*

namespace {

constexpr uint64_t NEVER = ~uint64_t(0);
constexpr int LINE_BYTES = 64, MEMORIES = CHANNELS + 1, DDR = CHANNELS, DIRECTIONS = 2;
constexpr int OKAY = 0, SLAVE_ERROR = 2, DECODE_ERROR = 3;

// Seeded stalls: typebar.isa.timing, `mixed` and `stall`.
enum StallPort { HBM_REQUEST, HBM_DATA, DDR_REQUEST, LINK_CW, LINK_CCW };

uint32_t mixed(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x68E31DA5u;
    return x ^ x >> 16;
}

struct Stalls {
    uint32_t seed = 0, rank = 0;
    uint64_t operator()(StallPort port, uint64_t index) const {
        if (!seed) return 0;
        const uint32_t h = mixed(mixed(mixed(seed) ^ (rank * 8 + port)) ^ uint32_t(index));
        return h % 16 ? 0 : 1 + (h >> 8) % 24;
    }
};

// An injected fault: from the event of this number on nothing comes, or the event alone is answered with an error.
struct Fault {
    uint64_t withheld = NEVER, error = NEVER;
};

// Makes a transfer wait: `ready` is low for the first `delay` cycles in which it is offered.
struct Gate {
    uint64_t age = 0;
    bool open(uint64_t delay) const { return age >= delay; }
    void offered() { age++; }
    void taken() { age = 0; }
};

class Memory {
  public:
    MemoryPins pins{};
    uint8_t *bytes = nullptr;
    uint64_t base = 0, size = 0;
    int width = 0;
    bool stalls_data = false;
    StallPort request_port = DDR_REQUEST;
    uint64_t read_latency = 1, write_latency = 1;
    Stalls stalls;
    Fault reads, writes;
    std::string error;

    void start_run() { taken_ = answered_ = written_ = 0; }

    // Forgets what is under way: a reset of the memory controller.
    void clear() {
        answers_.clear();
        stores_.clear();
        addresses_.clear();
        words_.clear();
        gate_ = Gate();
        last_due_ = 0;
        presented_ = false;
        refused_ = false;
        start_run();
    }

    void drive(uint64_t cycle) {
        const ReadPins &r = pins.read;
        *r.arready = gate_.open(stalls(request_port, taken_));
        const bool answer = !answers_.empty() && answers_.front().due <= cycle;
        *r.rvalid = answer;
        if (answer && !presented_) {
            std::memcpy(r.rdata, answers_.front().data, width);
            *r.rresp = answers_.front().response;
            *r.rlast = 1;
            presented_ = true;
        }
        const WritePins &w = pins.write;
        *w.awready = *w.wready = 1;
        *w.bvalid = !stores_.empty() && stores_.front().due <= cycle;
        if (*w.bvalid) {
            Store &store = stores_.front();
            *w.bresp = store.response;
            if (!store.done) apply(store);
        }
    }

    void sample(uint64_t cycle) {
        const ReadPins &r = pins.read;
        const uint64_t address = *r.araddr;
        if (refused_ && (!*r.arvalid || address != refused_address_)) error = "AR changed before it was taken";
        refused_ = *r.arvalid && !*r.arready;
        refused_address_ = address;
        if (*r.arvalid) {
            if (*r.arready) {
                take(cycle, address);
            } else {
                gate_.offered();
            }
        }
        if (*r.rvalid && *r.rready) {
            answers_.pop_front();
            presented_ = false;
        }
        sample_write(cycle);
    }

  private:
    struct Answer {
        uint64_t due;
        uint8_t response, data[128];
    };
    struct Store {
        uint64_t due, address;
        uint8_t response, data[128], strobe[16];
        bool done;
    };
    struct Word {
        uint8_t data[128], strobe[16];
    };
    std::deque<Answer> answers_;
    std::deque<Store> stores_;
    std::deque<uint64_t> addresses_;
    std::deque<Word> words_;
    Gate gate_;
    uint64_t taken_ = 0, answered_ = 0, written_ = 0, last_due_ = 0, refused_address_ = 0;
    bool presented_ = false, refused_ = false;

    bool inside(uint64_t address) const { return address >= base && address - base + width <= size; }

    // Data are those of the cycle in which the request is taken: the earliest that a memory might read.
    void take(uint64_t cycle, uint64_t address) {
        if (*pins.read.arlen) error = "a burst: the models know single beats";
        if (address % width) error = "an address that is no multiple of the port's width";
        Answer answer;
        const uint64_t late = stalls_data ? stalls(HBM_DATA, taken_) : 0;
        answer.due = std::max(cycle + read_latency + late, last_due_ + 1);
        answer.response = inside(address) ? OKAY : DECODE_ERROR;
        if (taken_ == reads.error) answer.response = SLAVE_ERROR;
        if (answer.response == OKAY) {
            std::memcpy(answer.data, bytes + (address - base), width);
        } else {
            std::memset(answer.data, 0xAA, width);
        }
        if (taken_ >= reads.withheld) answer.due = NEVER;
        last_due_ = answer.due == NEVER ? last_due_ : answer.due;
        answers_.push_back(answer);
        taken_++;
        gate_.taken();
    }

    void sample_write(uint64_t cycle) {
        const WritePins &w = pins.write;
        if (*w.bvalid && *w.bready) stores_.pop_front();
        if (*w.awvalid && *w.awready) {
            if (*w.awlen) error = "a burst: the models know single beats";
            if (*w.awaddr % width) error = "an address that is no multiple of the port's width";
            addresses_.push_back(*w.awaddr);
        }
        if (*w.wvalid && *w.wready) {
            if (!*w.wlast) error = "a burst: the models know single beats";
            Word word;
            std::memcpy(word.data, w.wdata, width);
            std::memcpy(word.strobe, w.wstrb, width / 8);
            words_.push_back(word);
        }
        if (addresses_.empty() || words_.empty()) return;
        Store store{};
        store.due = written_ >= writes.withheld ? NEVER : cycle + write_latency;
        store.address = addresses_.front();
        store.response = written_ == writes.error ? SLAVE_ERROR : inside(store.address) ? OKAY : DECODE_ERROR;
        std::memcpy(store.data, words_.front().data, width);
        std::memcpy(store.strobe, words_.front().strobe, width / 8);
        addresses_.pop_front();
        words_.pop_front();
        stores_.push_back(store);
        written_++;
    }

    // Data change when the response goes out: the latest that a memory might write.
    void apply(Store &store) {
        store.done = true;
        if (store.response != OKAY) return;
        uint8_t *to = bytes + (store.address - base);
        for (int i = 0; i < width; i++)
            if (store.strobe[i / 8] >> i % 8 & 1) to[i] = store.data[i];
    }
};

// One direction from one device to the next: a delay line, stalled at the first beat of a block; credits come back.
class Link {
  public:
    LinkPins from{}, to{};
    uint64_t latency = 1;
    bool connected = false;
    StallPort port = LINK_CW;
    Stalls stalls;
    Fault fault;

    void start_run() { blocks_ = 0; }
    void clear() {
        beats_.clear();
        credits_.clear();
        gate_ = Gate();
        inside_ = false;
        start_run();
    }

    void drive(uint64_t cycle) {
        *from.ready = inside_ || (blocks_ < fault.withheld && gate_.open(stalls(port, blocks_)));
        const bool credit = !credits_.empty() && credits_.front() <= cycle;
        *from.credit = credit;
        if (credit) credits_.pop_front();
        const bool arrives = !beats_.empty() && beats_.front().due <= cycle;
        *to.valid = arrives;
        if (arrives) {
            std::memcpy(to.data, beats_.front().data, ROW_BYTES);
            *to.user = beats_.front().user;
            *to.last = beats_.front().last;
        }
    }

    void sample(uint64_t cycle) {
        if (*to.credit && connected) credits_.push_back(cycle + latency);
        if (*to.valid && *to.ready) beats_.pop_front();
        if (!*from.valid) return;
        if (!*from.ready) return gate_.offered();
        gate_.taken();
        inside_ = !*from.last;
        blocks_ += *from.last;
        if (!connected) return;
        Beat beat;
        beat.due = cycle + latency;
        beat.user = *from.user;
        beat.last = *from.last;
        std::memcpy(beat.data, from.data, ROW_BYTES);
        beats_.push_back(beat);
    }

  private:
    struct Beat {
        uint64_t due;
        IData user;
        CData last;
        uint8_t data[ROW_BYTES];
    };
    std::deque<Beat> beats_;
    std::deque<uint64_t> credits_;
    Gate gate_;
    uint64_t blocks_ = 0;
    bool inside_ = false;
};

// The host's side of AXI4-Lite: one transfer at a time.
class Host {
  public:
    HostPins pins{};
    bool busy = false;
    uint32_t value = 0, response = 0;

    void write(uint32_t address, uint32_t data) {
        *pins.awaddr = address;
        *pins.wdata = data;
        *pins.wstrb = 15;
        *pins.awvalid = *pins.wvalid = *pins.bready = 1;
        busy = true;
    }
    void read(uint32_t address) {
        *pins.araddr = address;
        *pins.arvalid = *pins.rready = 1;
        busy = true;
    }
    void sample() {
        aw_ = *pins.awvalid && *pins.awready;
        w_ = *pins.wvalid && *pins.wready;
        ar_ = *pins.arvalid && *pins.arready;
        b_ = *pins.bvalid && *pins.bready;
        r_ = *pins.rvalid && *pins.rready;
        if (b_) response = *pins.bresp;
        if (r_) response = *pins.rresp, value = *pins.rdata;
    }
    void drive() {
        if (aw_) *pins.awvalid = 0;
        if (w_) *pins.wvalid = 0;
        if (ar_) *pins.arvalid = 0;
        if (b_) *pins.bready = 0;
        if (r_) *pins.rready = 0;
        if (b_ || r_) busy = false;
        aw_ = w_ = ar_ = b_ = r_ = false;
    }
    void drop() {
        *pins.awvalid = *pins.wvalid = *pins.arvalid = *pins.bready = *pins.rready = 0;
        busy = aw_ = w_ = ar_ = b_ = r_ = false;
    }

  private:
    bool aw_ = false, w_ = false, ar_ = false, b_ = false, r_ = false;
};

struct Device {
    std::unique_ptr<Vtop> top;
    Memory memories[MEMORIES];
    Link links[DIRECTIONS];  // of which this device is the sender
    Host host;
};

class Simulation {
    VerilatedContext context_;  // outlives the models

  public:
    uint64_t cycle = 0;
    std::string error;
    std::vector<Device> devices;

    Simulation(int count, const uint64_t *sizes, const uint64_t *latencies, uint64_t picoseconds)
        : devices(count), picoseconds_(picoseconds) {
        for (int d = 0; d < count; d++) {
            Device &device = devices[d];
            device.top = std::make_unique<Vtop>(&context_, ("device" + std::to_string(d)).c_str());
            for (int i = 0; i < MEMORIES; i++) add_memory(device.memories[i], d, i, sizes, latencies);
            bind_memories(*device.top, device.memories);
            bind_host(*device.top, device.host.pins);
        }
        for (int d = 0; d < count; d++) {
            for (int direction = 0; direction < DIRECTIONS; direction++) {
                const int next = (direction ? d + count - 1 : d + 1) % count;
                Link &link = devices[d].links[direction];
                DirectionPins mine = bind_link(*devices[d].top, direction);
                link.from = mine.out;
                link.to = bind_link(*devices[next].top, direction).in;
                link.latency = latencies[4];
                link.port = direction ? LINK_CCW : LINK_CW;
                link.stalls.rank = d;
                link.connected = count > 1;
            }
        }
        reset();
    }

    ~Simulation() {
        close_trace();
        for (Device &device : devices) {
            device.top->final();
            for (Memory &memory : device.memories)
                if (memory.bytes) munmap(memory.bytes, memory.size);
        }
    }

    // The board's reset: of the kernels, and of whatever the memories and links still owed them.
    void reset() {
        for (Device &device : devices) {
            device.top->ap_rst_n = 0;
            device.host.drop();
        }
        clear();
        for (int i = 0; i < 4; i++) step();
        clear();
        for (Device &device : devices) device.top->ap_rst_n = 1;
        step();
        error.clear();
    }

    void clear() {
        for (Device &device : devices) {
            for (Memory &memory : device.memories) memory.clear();
            for (Link &link : device.links) link.clear();
        }
    }

    void start_run(uint32_t seed) {
        for (Device &device : devices) {
            for (Memory &memory : device.memories) memory.start_run(), memory.stalls.seed = seed;
            for (Link &link : device.links) link.start_run(), link.stalls.seed = seed;
        }
    }

    // One cycle.
    void step() {
        for (Device &device : devices) {
            for (Memory &memory : device.memories) memory.drive(cycle);
            for (Link &link : device.links) link.drive(cycle);
            device.host.drive();
        }
        for (Device &device : devices) {
            device.top->ap_clk = 0;
            device.top->eval();
        }
        dump(0);
        for (Device &device : devices) {
            for (Memory &memory : device.memories) {
                memory.sample(cycle);
                if (!memory.error.empty()) fail(device, memory.error);
            }
            for (Link &link : device.links) link.sample(cycle);
            device.host.sample();
        }
        for (Device &device : devices) {
            device.top->ap_clk = 1;
            device.top->eval();
        }
        dump(1);
        cycle++;
    }

    bool run(uint64_t cycles) {
        for (uint64_t i = 0; i < cycles && error.empty(); i++) step();
        return error.empty();
    }

    // Waits until no host transfer is under way.
    bool settle(uint64_t cycles) {
        for (uint64_t i = 0; i < cycles && error.empty(); i++) {
            step();
            bool busy = false;
            for (Device &device : devices) {
                device.host.drive();
                busy |= device.host.busy;
            }
            if (!busy) return true;
        }
        for (Device &device : devices) device.host.drop();
        return false;
    }

    bool open_trace(const char *path) {
#if defined(TRACE_FST) || defined(TRACE_VCD)
        context_.traceEverOn(true);
        trace_ = std::make_unique<Trace>();
        for (Device &device : devices) device.top->trace(trace_.get(), 99);
        trace_->open(path);
        return trace_->isOpen();
#else
        (void)path;
        return false;
#endif
    }

    void close_trace() {
#if defined(TRACE_FST) || defined(TRACE_VCD)
        if (trace_) trace_->close();
        trace_.reset();
#endif
    }

  private:
    uint64_t picoseconds_;
#if defined(TRACE_FST) || defined(TRACE_VCD)
    std::unique_ptr<Trace> trace_;
#endif

    static void add_memory(Memory &memory, int rank, int index, const uint64_t *sizes, const uint64_t *latencies) {
        const bool ddr = index == DDR;
        memory.width = ddr ? LINE_BYTES : CHANNEL_BYTES;
        memory.size = sizes[ddr];
        memory.base = uint64_t(index + 1) << 40;
        memory.read_latency = latencies[ddr ? 2 : 0];
        memory.write_latency = latencies[ddr ? 3 : 1];
        memory.request_port = ddr ? DDR_REQUEST : HBM_REQUEST;
        memory.stalls_data = !ddr;
        memory.stalls.rank = rank;
        void *bytes = mmap(nullptr, memory.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        memory.bytes = bytes == MAP_FAILED ? nullptr : static_cast<uint8_t *>(bytes);
    }

    void fail(Device &device, std::string &what) {
        error = std::string(device.top->name()) + ": " + what + " in cycle " + std::to_string(cycle);
        what.clear();
    }

    void dump(int half) {
#if defined(TRACE_FST) || defined(TRACE_VCD)
        if (trace_) trace_->dump(cycle * picoseconds_ + (half ? picoseconds_ / 2 : 0));
#else
        (void)half;
#endif
    }
};

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// sizes: bytes of an HBM channel and of the DDR; latencies: HBM read, write, DDR read, write, link, in cycles.
API Simulation *sim_open(int devices, const uint64_t *sizes, const uint64_t *latencies, uint64_t picoseconds) {
    auto *sim = new Simulation(devices, sizes, latencies, picoseconds);
    for (Device &device : sim->devices)
        for (Memory &memory : device.memories)
            if (!memory.bytes) {
                delete sim;
                return nullptr;
            }
    return sim;
}
API void sim_close(Simulation *sim) { delete sim; }
API uint64_t sim_cycle(Simulation *sim) { return sim->cycle; }
API const char *sim_error(Simulation *sim) { return sim->error.c_str(); }
API void sim_reset(Simulation *sim) { sim->reset(); }
API void sim_clear(Simulation *sim) { sim->clear(); }
API void sim_start_run(Simulation *sim, uint32_t seed) { sim->start_run(seed); }
API int sim_run(Simulation *sim, uint64_t cycles) { return sim->run(cycles); }
API int sim_trace(Simulation *sim, const char *path) { return sim->open_trace(path); }
API uint8_t *sim_memory(Simulation *sim, int rank, int index) { return sim->devices[rank].memories[index].bytes; }
API uint64_t sim_pointer(Simulation *sim, int rank, int index) { return sim->devices[rank].memories[index].base; }
// Writes to every rank from `first` to `end` in the same cycles, so that a start is one on all.
API int sim_write(Simulation *sim, int first, int end, uint32_t address, uint32_t value, uint64_t cycles) {
    for (int d = first; d < end; d++) sim->devices[d].host.write(address, value);
    if (!sim->settle(cycles)) return -1;
    int bad = 0;
    for (int d = first; d < end; d++) bad |= sim->devices[d].host.response;
    return bad;
}
API int sim_read(Simulation *sim, int rank, uint32_t address, uint32_t *value, uint64_t cycles) {
    Host &host = sim->devices[rank].host;
    host.read(address);
    if (!sim->settle(cycles)) return -1;
    *value = host.value;
    return host.response;
}
// side 0: reads, or the clockwise link; 1: writes, or the anticlockwise link. memory < 0: the links.
API void sim_fault(Simulation *sim, int rank, int memory, int side, uint64_t withheld, uint64_t error) {
    Device &device = sim->devices[rank];
    Fault &fault = memory < 0 ? device.links[side].fault : side ? device.memories[memory].writes : device.memories[memory].reads;
    fault.withheld = withheld;
    fault.error = error;
}
