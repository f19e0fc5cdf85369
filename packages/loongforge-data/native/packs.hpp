// Best fit decreasing: the same packs as loongforge/data/solve/packs.py.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

namespace packs {

// Items by an amount; the one put last among equal amounts goes first.
class Stacks {
  public:
    bool empty() const { return by_amount_.empty(); }
    void put(int64_t amount, int64_t item) { by_amount_[amount].push_back(item); }

    // The least amount that is at least `amount`, -1 without one.
    int64_t at_least(int64_t amount) const {
        const auto found = by_amount_.lower_bound(amount);
        return found == by_amount_.end() ? -1 : found->first;
    }

    // The greatest amount that is at most `amount`, -1 without one.
    int64_t at_most(int64_t amount) const {
        const auto found = by_amount_.upper_bound(amount);
        return found == by_amount_.begin() ? -1 : std::prev(found)->first;
    }

    int64_t take(int64_t amount) {
        const auto found = by_amount_.find(amount);
        const int64_t item = found->second.back();
        found->second.pop_back();
        if (found->second.empty()) by_amount_.erase(found);
        return item;
    }

  private:
    std::map<int64_t, std::vector<int64_t>> by_amount_;
};

// Pack of each length, longest first; returns how many packs there are.
inline int64_t best_fit(const int64_t *lengths, int64_t count, int64_t capacity, int64_t every, int64_t *chosen) {
    Stacks open, spare;
    std::vector<int64_t> order;
    order.reserve(count);
    for (int64_t place = 0; place < count; ++place)
        every && place % every == every - 1 ? spare.put(lengths[place], place) : order.push_back(place);
    const int64_t smallest = count ? lengths[count - 1] : 0;
    int64_t packs = 0;
    for (size_t next = 0; next < order.size() || !spare.empty();) {
        int64_t place, space;
        if (next == order.size()) {
            place = spare.take(spare.at_most(capacity));
            space = open.at_least(lengths[place]);
        } else {
            place = order[next];
            space = open.at_least(lengths[place]);
            const int64_t better = space - lengths[place] > 0 && space - lengths[place] < smallest ? spare.at_most(space) : -1;
            if (better > lengths[place]) place = spare.take(better);
            else ++next;
        }
        if (space < 0) {
            chosen[place] = packs++;
            space = capacity;
        } else {
            chosen[place] = open.take(space);
        }
        if (space - lengths[place] >= smallest) open.put(space - lengths[place], chosen[place]);
    }
    return packs;
}

// Places by pack, in their order within each; `offsets` has packs + 1 numbers, 0 at first.
inline void group(const int64_t *chosen, int64_t count, int64_t packs, int64_t *places, int64_t *offsets) {
    for (int64_t place = 0; place < count; ++place) ++offsets[chosen[place] + 1];
    for (int64_t one = 0; one < packs; ++one) offsets[one + 1] += offsets[one];
    std::vector<int64_t> next(offsets, offsets + packs);
    for (int64_t place = 0; place < count; ++place) places[next[chosen[place]]++] = place;
}

}  // namespace packs
