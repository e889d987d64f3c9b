// The memory unit between an instruction list, a register file and AXI memories; see memory_bench.py, which puts the
// widths and the places of ports (words of 32 bits in `in` and `out`) in front of this text.
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

double sc_time_stamp() { return 0; }

struct Settings {
    int32_t read_latency, ddr_latency, hbm_latency, period, seed, bad_read, bad_ddr, bad_hbm;
    int64_t limit;
};

struct Beat {
    int64_t due;
    uint64_t address;
    std::vector<uint8_t> data, strobe;
};

// xorshift: only for the disorder of `seed` != 0.
static uint32_t state;
static uint32_t draw() {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}

static uint32_t in[IN_WORDS], out[OUT_WORDS];
static bool bit(int port, int index = 0) { return out[port + index / 32] >> (index % 32) & 1; }
static void set(int port, int index, bool value) {
    in[port + index / 32] = (in[port + index / 32] & ~(1u << index % 32)) | (uint32_t)value << (index % 32);
}
static uint64_t field(int port, int64_t low, int width) {
    uint64_t value = 0;
    for (int i = 0; i < width; i++) value |= (uint64_t)bit(port, low + i) << i;
    return value;
}

// A port that takes writes; bytes are in memory when the answer is there.
struct Writes {
    std::deque<Beat> addresses, data, answers;
    std::vector<bool> ready = {true, true};
    bool answering = false;
    int64_t answered = 0;

    void drive(int64_t cycle, bool disorder, uint8_t *memory) {
        ready = {!disorder || draw() % 3 != 0, !disorder || draw() % 3 != 0};
        if (!answering && !answers.empty() && answers.front().due <= cycle && (!disorder || draw() % 2)) {
            Beat &beat = answers.front();
            for (size_t i = 0; i < beat.data.size(); i++)
                if (beat.strobe[i]) memory[beat.address + i] = beat.data[i];
            answering = true;
        }
    }
    void take(int64_t cycle, int latency, bool address_valid, uint64_t address, bool data_valid, const uint8_t *bytes,
              int port, int64_t low, int count, bool answer_ready) {
        if (address_valid && ready[0]) addresses.push_back({0, address, {}, {}});
        if (data_valid && ready[1]) {
            Beat beat{0, 0, {bytes, bytes + count}, {}};
            for (int i = 0; i < count; i++) beat.strobe.push_back(bit(port, low + i));
            data.push_back(beat);
        }
        if (answering && answer_ready) answers.pop_front(), answering = false, answered++;
        while (!addresses.empty() && !data.empty()) {
            Beat beat = data.front();
            beat.address = addresses.front().address, beat.due = cycle + latency;
            answers.push_back(beat);
            addresses.pop_front(), data.pop_front();
        }
    }
};

extern "C" int64_t run(const Settings *s, int64_t n, const uint32_t *payloads, const int32_t *gaps, const int32_t *waits,
                       const uint32_t *waited, const uint32_t *bases, const int32_t *stalls, uint32_t *registers,
                       uint8_t *ddr, uint8_t *hbm, int64_t channel_size, int64_t *starts, int64_t *dones,
                       int64_t *scalars, int64_t *causes, int64_t *blamed, int64_t *events) {
    VerilatedContext context;
    Vtop top(&context, "bench");
    state = 2463534242u + s->seed;
    const bool disorder = s->seed != 0;
    std::memset(in, 0, sizeof in);
    std::memset(out, 0, sizeof out);
    std::memcpy(in + IN_bases, bases, 4 * (BASES_WORDS));
    std::deque<Beat> reads;
    Writes ddr_writes;
    std::vector<Writes> channels(CHANNELS);
    std::vector<uint32_t> passing[2] = {std::vector<uint32_t>(LANES), std::vector<uint32_t>(LANES)}, row(LANES);
    uint32_t late_row = 0, late_mask = 0;
    int64_t asked = 0, answered = 0, completed = 0, next = 0, last_start = -1;
    int stall = stalls ? stalls[0] : 0;
    bool answering = false, was_active = false;
    int64_t cycle = 0;
    for (; cycle < s->limit && completed < n; cycle++) {
        uint32_t now = field(OUT_completed, 0, TICKET_BITS);
        while ((uint32_t)(completed & ((1 << TICKET_BITS) - 1)) != now) dones[completed++] = cycle;
        set(IN_write_slot, 0, cycle % s->period == s->period - 1);
        bool offers = next < n && cycle >= last_start + 1 + gaps[next] && completed >= waits[next];
        set(IN_valid, 0, offers);
        if (next < n) {
            std::memcpy(in + IN_payload, payloads + next * PAYLOAD_WORDS, 4 * PAYLOAD_WORDS);
            in[IN_waited] = waited[next];
        }
        std::memcpy(in + IN_read_data, passing[cycle & 1].data(), 4 * LANES);
        if (!answering && !reads.empty() && reads.front().due <= cycle && (!disorder || draw() % 2)) answering = true;
        bool asks_ready = stall == 0 && (!disorder || draw() % 3 != 0);
        set(IN_ar_ready, 0, asks_ready);
        set(IN_r_valid, 0, answering);
        if (answering) std::memcpy(in + IN_r_data, reads.front().data.data(), 64);
        in[IN_r_resp] = answering && answered == s->bad_read ? 2 : 0;
        ddr_writes.drive(cycle, disorder, ddr);
        set(IN_ddr_aw_ready, 0, ddr_writes.ready[0]);
        set(IN_ddr_w_ready, 0, ddr_writes.ready[1]);
        set(IN_ddr_b_valid, 0, ddr_writes.answering);
        in[IN_ddr_b_resp] = ddr_writes.answered == s->bad_ddr ? 3 : 0;
        for (int c = 0; c < CHANNELS; c++) {
            channels[c].drive(cycle, disorder, hbm + c * channel_size);
            set(IN_hbm_aw_ready, c, channels[c].ready[0]);
            set(IN_hbm_w_ready, c, channels[c].ready[1]);
            set(IN_hbm_b_valid, c, channels[c].answering);
            set(IN_hbm_b_resp, 2 * c + 1, c == 0 && channels[c].answered == s->bad_hbm);
        }
        top.clk = 0;
        drive(top, in);
        top.eval();
        sample(top, out);

        if (offers && bit(OUT_ready)) starts[next] = last_start = cycle, next++;
        bool active = bit(OUT_active);
        if (active) {
            causes[out[OUT_cause]]++;
            if (!was_active) blamed[next - 1 - (last_start == cycle)] = out[OUT_blamed];
        }
        was_active = active;
        if (bit(OUT_scalar_valid)) scalars[2 * (next - 1)] = cycle, scalars[2 * (next - 1) + 1] = out[OUT_scalar_data];
        if (bit(OUT_saturated) && events[0] < 0) events[0] = out[OUT_saturated_pc];
        events[1] += bit(OUT_error);
        // A row is read as it was two cycles after the latest write that may be missing from it.
        std::memcpy(passing[cycle & 1].data(), registers + out[OUT_read_address] * LANES, 4 * LANES);
        for (int i = 0; i < LANES; i++)
            if (late_mask >> i & 1) registers[late_row * LANES + i] = row[i];
        late_row = out[OUT_write_address], late_mask = out[OUT_write_mask];
        std::memcpy(row.data(), out + OUT_write_data, 4 * LANES);
        if (bit(OUT_ar_valid)) {
            if (asks_ready) {
                uint8_t *bytes = ddr + field(OUT_ar_addr, 0, DDR_BITS);
                reads.push_back({cycle + s->read_latency, 0, {bytes, bytes + 64}, {}});
                stall = stalls ? stalls[++asked] : 0;
            } else if (stall) {
                stall--;
            }
        }
        if (answering && bit(OUT_r_ready)) reads.pop_front(), answering = false, answered++;
        ddr_writes.take(cycle, s->ddr_latency, bit(OUT_ddr_aw_valid), field(OUT_ddr_aw_addr, 0, DDR_BITS),
                        bit(OUT_ddr_w_valid), (uint8_t *)(out + OUT_ddr_w_data), OUT_ddr_w_strb, 0, 64,
                        bit(OUT_ddr_b_ready));
        for (int c = 0; c < CHANNELS; c++)
            channels[c].take(cycle, s->hbm_latency, bit(OUT_hbm_aw_valid, c),
                             bit(OUT_hbm_aw_valid, c) ? field(OUT_hbm_aw_addr, c * HBM_BITS, HBM_BITS) : 0,
                             bit(OUT_hbm_w_valid, c), (uint8_t *)(out + OUT_hbm_w_data) + c * CHANNEL_BYTES,
                             OUT_hbm_w_strb, c * CHANNEL_BYTES, CHANNEL_BYTES, bit(OUT_hbm_b_ready, c));
        top.clk = 1;
        top.eval();
        sample(top, out);
    }
    return cycle;
}
