// Items to ranks. The same steps, ties and integers as loongforge/data/solve/ranks.py, which says what they are for.
//
// Items come sorted by cost, dearest first; an item is its place in that order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <queue>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace ranks {

using Places = std::vector<int32_t>;
__extension__ typedef __int128 Wide;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

inline void drop(Places &items, int32_t place) {
    items.erase(std::lower_bound(items.begin(), items.end(), place));
}

inline void add(Places &items, int32_t place) {
    items.insert(std::lower_bound(items.begin(), items.end(), place), place);
}

// Ranks by load, ties by number.
class Standing {
  public:
    explicit Standing(const std::vector<int64_t> &loads) : loads_(loads) {
        for (int32_t rank = 0; rank < static_cast<int32_t>(loads.size()); ++rank) order_.emplace(loads[rank], rank);
    }

    int32_t fullest() const { return order_.rbegin()->second; }
    int64_t load(int32_t rank) const { return loads_[rank]; }

    // Of the `most` emptiest ranks those that are not `but`.
    Places emptiest(int most, int32_t but) const {
        Places found;
        for (auto at = order_.begin(); at != order_.end() && most-- > 0; ++at)
            if (at->second != but) found.push_back(at->second);
        return found;
    }

    void shift(int32_t from, int32_t to, int64_t cost) {
        order_.erase({loads_[from], from});
        order_.erase({loads_[to], to});
        loads_[from] -= cost;
        loads_[to] += cost;
        order_.emplace(loads_[from], from);
        order_.emplace(loads_[to], to);
    }

  private:
    std::vector<int64_t> loads_;
    std::set<std::pair<int64_t, int32_t>> order_;
};

inline void owners(const std::vector<Places> &of, int64_t *owner) {
    for (size_t rank = 0; rank < of.size(); ++rank)
        for (int32_t place : of[rank]) owner[place] = static_cast<int64_t>(rank);
}

struct Swap {
    int32_t give = -1;
    int32_t take = -1;
    int64_t shift = 0;
};

inline Swap closest_swap(const Places &full, const Places &empty, const int64_t *costs, int64_t gap) {
    Swap best;
    int64_t least = kMost;
    const size_t size = empty.size();
    size_t at = 0;
    for (int32_t give : full) {
        while (at < size && 2 * (costs[give] - costs[empty[at]]) < gap) ++at;
        for (size_t one : {at, at - 1}) {
            if (one > size) continue;  // at - 1 of at == 0 wraps
            const int64_t shift = costs[give] - (one < size ? costs[empty[one]] : 0);
            const int64_t miss = std::abs(2 * shift - gap);
            if (shift <= 0 || shift >= gap || miss >= least) continue;
            least = miss;
            best = {give, one < size ? empty[one] : -1, shift};
        }
    }
    return best;
}

inline void assign(const int64_t *costs, int64_t count, int64_t ranks, int64_t goal, int look, int64_t *owner) {
    using Load = std::tuple<int64_t, int64_t, int32_t>;  // load, items, rank
    std::vector<Places> of(ranks);
    std::vector<int64_t> loads(ranks);
    std::priority_queue<Load, std::vector<Load>, std::greater<Load>> heap;
    for (int32_t rank = 0; rank < ranks; ++rank) heap.emplace(0, 0, rank);
    for (int32_t place = 0; place < count; ++place) {
        const auto [load, items, rank] = heap.top();
        heap.pop();
        of[rank].push_back(place);
        loads[rank] = load + costs[place];
        heap.emplace(loads[rank], items + 1, rank);
    }
    Standing standing(loads);
    for (int64_t step = 0; step < 64 + 16 * ranks; ++step) {
        const int32_t full = standing.fullest();
        if (standing.load(full) <= goal) break;
        Swap swap;
        int32_t empty = -1;
        for (int32_t one : standing.emptiest(look, full)) {
            empty = one;
            swap = closest_swap(of[full], of[one], costs, standing.load(full) - standing.load(one));
            if (swap.give >= 0) break;
        }
        if (swap.give < 0) break;
        drop(of[full], swap.give);
        if (swap.take >= 0) drop(of[empty], swap.take), add(of[full], swap.take);
        add(of[empty], swap.give);
        standing.shift(full, empty, swap.shift);
    }
    owners(of, owner);
}

inline void spread(const int64_t *costs, int64_t count, int64_t kinds, int64_t ranks, int64_t *owner) {
    std::vector<int64_t> loads(kinds * ranks), items(ranks), peak(ranks);
    for (int64_t place = 0; place < count; ++place) {
        const int64_t *cost = costs + place * kinds;
        std::fill(peak.begin(), peak.end(), 0);
        for (int64_t kind = 0; kind < kinds; ++kind) {
            if (cost[kind] == 0) continue;
            const int64_t *load = loads.data() + kind * ranks;
            for (int64_t rank = 0; rank < ranks; ++rank) peak[rank] = std::max(peak[rank], load[rank] + cost[kind]);
        }
        int64_t best = 0;
        for (int64_t rank = 1; rank < ranks; ++rank)
            if (peak[rank] < peak[best] || (peak[rank] == peak[best] && items[rank] < items[best])) best = rank;
        for (int64_t kind = 0; kind < kinds; ++kind) loads[kind * ranks + best] += cost[kind];
        ++items[best];
        owner[place] = best;
    }
}

struct Exchange {
    int32_t give = -1;
    int32_t partner = -1;
    Places take;
    int64_t shift = 0;
    int64_t gain = 0;
    int64_t moved = 1;

    // More gain for every token moved.
    bool pays_more(int64_t other_gain, int64_t other_moved) const {
        return static_cast<Wide>(other_gain) * moved > static_cast<Wide>(gain) * other_moved;
    }
};

class Rebalance {
  public:
    Rebalance(const int64_t *costs, const int64_t *tokens, const int64_t *home, const int64_t *start, int64_t count,
              int64_t ranks, int64_t cap)
        : costs_(costs), tokens_(tokens), home_(home), cap_(cap), of_(ranks), used_(ranks), standing_({}) {
        std::vector<int64_t> loads(ranks);
        for (int32_t place = 0; place < count; ++place) {
            of_[start[place]].push_back(place);
            loads[start[place]] += costs[place];
            used_[start[place]] += tokens[place];
        }
        standing_ = Standing(loads);
    }

    void run(int64_t aim, int64_t accept, int look, int64_t *owner) {
        for (int64_t step = 0; step < 64 + 16 * static_cast<int64_t>(of_.size()); ++step) {
            const int32_t full = standing_.fullest();
            if (standing_.load(full) <= aim) break;
            const Places partners = standing_.emptiest(look, full);
            Exchange best = single(full, partners, aim);
            if (best.give < 0 && standing_.load(full) > accept) best = several(full, partners, aim);
            if (best.give < 0) break;
            apply(full, best);
        }
        owners(of_, owner);
    }

  private:
    // Tokens that count as moved when an item goes from one rank to another.
    int64_t moved(int32_t place, int32_t from, int32_t to) const {
        return home_[place] == from ? tokens_[place] : home_[place] == to ? -tokens_[place] : 0;
    }

    Exchange single(int32_t full, const Places &partners, int64_t aim) const {
        Exchange best;
        const int64_t need = standing_.load(full) - aim;
        for (int32_t partner : partners) {
            const int64_t slack = aim - standing_.load(partner);
            if (slack <= 0) break;
            const Places &theirs = of_[partner];
            size_t at = 0;
            for (int32_t give : of_[full]) {
                while (at < theirs.size() && costs_[theirs[at]] >= costs_[give] - slack) ++at;
                if (costs_[give] <= slack) consider(best, full, partner, give, -1, need);
                if (at > 0) consider(best, full, partner, give, theirs[at - 1], need);
            }
        }
        return best;
    }

    void consider(Exchange &best, int32_t full, int32_t partner, int32_t give, int32_t take, int64_t need) const {
        const int64_t shift = costs_[give] - (take >= 0 ? costs_[take] : 0);
        const int64_t more = tokens_[give] - (take >= 0 ? tokens_[take] : 0);
        if (shift <= 0 || more > cap_ - used_[partner] || -more > cap_ - used_[full]) return;
        const int64_t gain = std::min(shift, need);
        const int64_t cost =
            std::max<int64_t>(1, moved(give, full, partner) + (take >= 0 ? moved(take, partner, full) : 0));
        const bool whole = gain == need, had_whole = best.give >= 0 && best.gain == need;
        if (whole != had_whole ? !whole : whole ? cost >= best.moved : !best.pays_more(gain, cost)) return;
        best = {give, partner, take >= 0 ? Places{take} : Places{}, shift, gain, cost};
    }

    Exchange several(int32_t full, const Places &partners, int64_t aim) const {
        Exchange best;
        for (int32_t partner : partners)
            for (int32_t give : of_[full])
                for (bool dearest : {false, true}) bundle(best, full, partner, give, dearest, aim);
        return best;
    }

    void bundle(Exchange &best, int32_t full, int32_t partner, int32_t give, bool dearest, int64_t aim) const {
        const Places &theirs = of_[partner];
        const int64_t need = standing_.load(full) - aim, room = costs_[give] - need;
        const int64_t lack = tokens_[give] - (cap_ - used_[partner]);
        Places take;
        int64_t back = 0, cost = 0, count = moved(give, full, partner);
        auto put = [&](int32_t place) {
            take.push_back(place);
            back += tokens_[place];
            cost += costs_[place];
            count += moved(place, partner, full);
        };
        if (dearest) {
            for (size_t at = 0; at < theirs.size() && (back < lack || cost < room); ++at)
                if (cost + costs_[theirs[at]] <= room) put(theirs[at]);
        } else {
            for (size_t at = theirs.size(); back < lack && at > 0;) put(theirs[--at]);
        }
        if (back < lack || back - tokens_[give] > cap_ - used_[full]) return;
        const int64_t shift = costs_[give] - cost;
        const int64_t gain = std::min({need, shift, standing_.load(full) - standing_.load(partner) - shift});
        count = std::max<int64_t>(1, count);
        if (gain > 0 && best.pays_more(gain, count)) best = {give, partner, std::move(take), shift, gain, count};
    }

    void apply(int32_t full, const Exchange &one) {
        drop(of_[full], one.give);
        int64_t more = tokens_[one.give];
        for (int32_t place : one.take) {
            drop(of_[one.partner], place);
            add(of_[full], place);
            more -= tokens_[place];
        }
        add(of_[one.partner], one.give);
        used_[full] -= more;
        used_[one.partner] += more;
        standing_.shift(full, one.partner, one.shift);
    }

    const int64_t *costs_, *tokens_, *home_;
    int64_t cap_;
    std::vector<Places> of_;
    std::vector<int64_t> used_;
    Standing standing_;
};

}  // namespace ranks
