// loongforge.data.solve._native: the searches over int64 arrays. `solve/__init__.py` says what they promise.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "packs.hpp"
#include "ranks.hpp"

namespace py = pybind11;
using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

static int64_t counted(const Ints &items) {
    const int64_t count = items.shape(0);
    if (count > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("more than 2^31 - 1 items");
    return count;
}

static Ints assign(const Ints &costs, int64_t ranks, int64_t goal, int look) {
    Ints owner(counted(costs));
    int64_t *to = owner.mutable_data();
    py::gil_scoped_release released;
    ranks::assign(costs.data(), costs.shape(0), ranks, goal, look, to);
    return owner;
}

static Ints spread(const Ints &costs, int64_t ranks) {
    Ints owner(counted(costs));
    int64_t *to = owner.mutable_data();
    py::gil_scoped_release released;
    ranks::spread(costs.data(), costs.shape(0), costs.shape(1), ranks, to);
    return owner;
}

static Ints rebalance(const Ints &costs, const std::tuple<Ints, Ints, Ints> &held, int64_t ranks, int64_t cap,
                      int64_t aim, int64_t accept, int look) {
    const auto &[tokens, home, start] = held;
    Ints owner(counted(costs));
    int64_t *to = owner.mutable_data();
    py::gil_scoped_release released;
    ranks::Rebalance search(costs.data(), tokens.data(), home.data(), start.data(), costs.shape(0), ranks, cap);
    search.run(aim, accept, look, to);
    return owner;
}

static py::tuple fit(const Ints &lengths, int64_t capacity, int64_t every) {
    const int64_t count = counted(lengths);
    std::vector<int64_t> chosen(count);
    int64_t made;
    {
        py::gil_scoped_release released;
        made = packs::best_fit(lengths.data(), count, capacity, every, chosen.data());
    }
    Ints places(count), offsets(made + 1);
    int64_t *to = places.mutable_data(), *ends = offsets.mutable_data();
    std::fill(ends, ends + made + 1, 0);
    packs::group(chosen.data(), count, made, to, ends);
    return py::make_tuple(places, offsets);
}

PYBIND11_MODULE(_native, module) {
    module.attr("source") = LOONGFORGE_SOURCE;
    module.def("assign", &assign);
    module.def("spread", &spread);
    module.def("rebalance", &rebalance);
    module.def("fit", &fit);
}
