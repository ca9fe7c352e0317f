// A pretended accelerator for tests: its memory is the host's, its operators are those of the CPU,
// and its collectives are those of gloo. `device.py` gives it a name and the manners of a real one.
// Copies from pinned memory on a stream run as late as the events allow, so that a missing wait leads
// to wrong numbers; everything else runs at once. It finds wrong devices and missing operators, too.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <ATen/Functions.h>
#include <ATen/CPUFunctions.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/resize_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <unordered_set>

namespace {
constexpr auto kDev = c10::DeviceType::PrivateUse1;
int g_count = 1;
thread_local c10::DeviceIndex t_device = 0;
thread_local c10::StreamId t_stream = 0;
std::mutex g_mutex;
std::set<std::string> g_seen;                    // operators that ran
std::unordered_set<std::string> g_native;        // if not empty: the only operators there are
std::unordered_set<const void*> g_pinned;
bool g_has_float64 = true;

// -- streams: copies that have not run yet, each with its number
struct Late { int64_t number; std::function<void()> run; };
std::map<c10::StreamId, std::deque<Late>> g_late;
std::recursive_mutex g_late_mutex;
int64_t g_num_late = 0;
// A thread that has the mutex may wait for Python's lock, which a reference to a tensor with a Python
// object needs: so no thread waits for the mutex while it has Python's lock.
struct LateLock {
  PyThreadState* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  LateLock() { g_late_mutex.lock(); }
  ~LateLock() { g_late_mutex.unlock(); if (state) PyEval_RestoreThread(state); }
};
struct Recorded { c10::StreamId stream; int64_t number; };
void run_late(c10::StreamId stream, int64_t last) {
  LateLock l;
  auto& late = g_late[stream];
  while (!late.empty() && late.front().number <= last) { late.front().run(); late.pop_front(); }
}
void run_late(void* event) {
  if (auto* e = static_cast<Recorded*>(event)) run_late(e->stream, e->number);
}

// -- memory
void free_it(void* p) { std::free(p); }
struct DevAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? std::calloc(1, n) : nullptr;
    return {p, p, &free_it, c10::Device(kDev, t_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_it; }
  void copy_data(void* d, const void* s, std::size_t n) const final { std::memcpy(d, s, n); }
};
DevAllocator g_alloc;
REGISTER_ALLOCATOR(kDev, &g_alloc);
void free_pinned(void* p) { std::lock_guard<std::mutex> l(g_mutex); g_pinned.erase(p); std::free(p); }
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? std::malloc(n) : nullptr;
    if (p) { std::lock_guard<std::mutex> l(g_mutex); g_pinned.insert(p); }
    return {p, p, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* d, const void* s, std::size_t n) const final { std::memcpy(d, s, n); }
};
PinnedAllocator g_pinned_alloc;

// -- generator: a CPU one inside
struct DevGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit DevGenerator(c10::DeviceIndex i)
      : c10::GeneratorImpl(c10::Device(kDev, i), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::make_generator<at::CPUGeneratorImpl>()) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t o) override { inner.set_offset(o); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  static c10::DeviceType device_type() { return kDev; }
 private:
  DevGenerator* clone_impl() const override {
    auto* g = new DevGenerator(device().index());
    g->inner = inner.clone();
    return g;
  }
};
std::vector<at::Generator>& defaults() {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> v;
    for (int i = 0; i < 16; i++) v.push_back(at::make_generator<DevGenerator>(i));
    return v;
  }();
  return all;
}

// -- guard
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDev; }
  c10::Device exchangeDevice(c10::Device d) const override { auto o = getDevice(); uncheckedSetDevice(d); return o; }
  c10::Device getDevice() const override { return {kDev, t_device}; }
  void setDevice(c10::Device d) const override { t_device = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { if (d.index() >= 0) t_device = d.index(); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::UNSAFE, {kDev, d.index() < 0 ? t_device : d.index()}, t_stream); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, {kDev, d.index() < 0 ? t_device : d.index()}); }
  c10::Stream getNewStream(c10::Device d, int) const override { static c10::StreamId next = 1; return c10::Stream(c10::Stream::UNSAFE, {kDev, d.index() < 0 ? t_device : d.index()}, next++); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override { auto o = getStream(s.device()); t_stream = s.id(); return o; }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    LateLock l;
    if (*e == nullptr) *e = new Recorded();
    *static_cast<Recorded*>(*e) = {s.id(), g_num_late};
  }
  void block(void* e, const c10::Stream&) const override { run_late(e); }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete static_cast<Recorded*>(e); }
  c10::DeviceIndex deviceCount() const noexcept override { return g_count; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& s) const override { run_late(s.id(), g_num_late); }
  void synchronizeEvent(void* e) const override { run_late(e); }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// -- hooks
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return g_count > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return g_count; }
  void setCurrentDevice(c10::DeviceIndex d) const override { t_device = d; }
  c10::DeviceIndex getCurrentDevice() const override { return t_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { auto o = t_device; t_device = d; return o; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { auto o = t_device; if (d >= 0) t_device = d; return o; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return defaults()[i < 0 ? t_device : i]; }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override { return at::make_generator<DevGenerator>(i < 0 ? t_device : i); }
  at::Device getDeviceFromPtr(void*) const override { return {kDev, t_device}; }
  bool isPinnedPtr(const void* p) const override { std::lock_guard<std::mutex> l(g_mutex); return g_pinned.count(p) > 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &g_pinned_alloc; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    at::native::resize_bytes_cpu(s.unsafeGetStorageImpl(), n);
  }
};
Hooks g_hooks;

// -- operators
at::Tensor host(const at::Tensor& t) {  // the same memory, seen from the CPU
  if (!t.defined() || t.device().type() != kDev) return t;
  auto base = t.detach().resolve_conj().resolve_neg();
  return at::from_blob(base.data_ptr(), base.sizes(), base.strides(), [base](void*) {}, base.options().device(at::kCPU).requires_grad(false));
}
void check_dtype(std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(g_has_float64 || c10::dtype_or_default(dtype) != at::kDouble, "this device has no float64");
}
at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> dev,
                 std::optional<bool>, std::optional<at::MemoryFormat> mf) {
  check_dtype(dtype);
  c10::DeviceGuard guard(c10::Device(kDev, dev && dev->index() >= 0 ? dev->index() : t_device));
  return at::detail::empty_generic(size, &g_alloc, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), mf);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> dev, std::optional<bool>) {
  check_dtype(dtype);
  c10::DeviceGuard guard(c10::Device(kDev, dev && dev->index() >= 0 ? dev->index() : t_device));
  return at::detail::empty_strided_generic(size, stride, &g_alloc, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  if (non_blocking && t_stream != 0 && self.is_cpu() && self.is_pinned()) {
    at::NoGradGuard no_grad;
    auto from = self.detach(), to = dst.detach();
    LateLock l;
    g_late[t_stream].push_back({++g_num_late, [from, to] { host(to).copy_(host(from)); }});
    return dst;
  }
  run_late(t_stream, g_num_late);
  host(dst).copy_(host(self));
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) { dst.resize_(self.sizes()); host(dst).copy_(host(self)); return dst; }
at::Scalar local_scalar_dense(const at::Tensor& self) { return host(self).item(); }
at::Tensor& set_source_storage_offset(at::Tensor& r, at::Storage s, int64_t o, c10::IntArrayRef size, c10::IntArrayRef stride) { return at::cpu::set_(r, s, o, size, stride); }
at::Tensor as_strided(const at::Tensor& s, at::IntArrayRef size, at::IntArrayRef st, std::optional<int64_t> o) { return at::cpu::as_strided(s, size, st, o); }
at::Tensor view(const at::Tensor& s, at::IntArrayRef size) { return at::native::view(s, size); }
at::Tensor reshape_alias(const at::Tensor& s, at::IntArrayRef size, at::IntArrayRef st) { return at::native::_reshape_alias(s, size, st); }
const at::Tensor& resize(const at::Tensor& s, at::IntArrayRef size, std::optional<at::MemoryFormat> mf) { return at::native::resize_(s, size, mf); }
void record_stream(at::Tensor&, at::Stream) {}
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {x.clone(), at::ones_like(x, x.options().dtype(at::kBool))};
  auto mask = at::empty_like(x, x.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {x * mask * (p < 1 ? 1 / (1 - p) : 0.0), mask};
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto name = c10::toString(op.operator_name());
  {
    std::lock_guard<std::mutex> l(g_mutex);
    g_seen.insert(name);
    TORCH_CHECK_NOT_IMPLEMENTED(g_native.empty() || g_native.count(name), "operator '", name, "' is not implemented for this device");
  }
  const auto& args = op.schema().arguments();
  const auto begin = stack->size() - args.size();
  for (size_t i = 0; i < args.size(); i++) {
    auto& v = (*stack)[begin + i];
    const bool wants = args[i].type()->str().find("Generator") != std::string::npos;
    if (wants && v.isNone()) v = defaults()[t_device].get<DevGenerator>()->inner;
    else if (wants && v.toGenerator().device().type() == kDev) v = v.toGenerator().get<DevGenerator>()->inner;
  }
  at::native::cpu_fallback(op, stack);
}
#define LOW_(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32_(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
}
using namespace at::autocast;
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { using namespace at; AT_FORALL_LOWER_PRECISION_FP(LOW_) AT_FORALL_FP32(FP32_) }
namespace {
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", &set_source_storage_offset);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("record_stream", &record_stream);
  m.impl("native_dropout", &native_dropout);
}

// -- communication
using Tensors = std::vector<at::Tensor>;
using W = c10::intrusive_ptr<c10d::Work>;
Tensors hosts(const Tensors& ts) { Tensors out; for (auto& t : ts) out.push_back(host(t)); return out; }
std::vector<Tensors> hosts2(const std::vector<Tensors>& ts) { std::vector<Tensors> out; for (auto& t : ts) out.push_back(hosts(t)); return out; }
struct Aliasing final : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> in;
  std::string name;
  bool reduces;
  Aliasing(c10::intrusive_ptr<c10d::Backend> b, std::string n, bool r) : Backend(b->getRank(), b->getSize()), in(std::move(b)), name(std::move(n)), reduces(r) {}
  const std::string getBackendName() const override { return name; }
  void setTimeout(std::chrono::milliseconds t) override { in->setTimeout(t); }
  W broadcast(Tensors& t, const c10d::BroadcastOptions& o) override { auto h = hosts(t); return in->broadcast(h, o); }
  W allreduce(Tensors& t, const c10d::AllreduceOptions& o) override { auto h = hosts(t); return in->allreduce(h, o); }
  W reduce(Tensors& t, const c10d::ReduceOptions& o) override { TORCH_CHECK(reduces, "Backend ", name, " does not support reduce"); auto h = hosts(t); return in->reduce(h, o); }
  W allgather(std::vector<Tensors>& a, Tensors& b, const c10d::AllgatherOptions& o) override { auto x = hosts2(a); auto y = hosts(b); return in->allgather(x, y, o); }
  W _allgather_base(at::Tensor& a, at::Tensor& b, const c10d::AllgatherOptions& o) override { auto x = host(a); auto y = host(b); return in->_allgather_base(x, y, o); }
  W allgather_into_tensor_coalesced(Tensors& a, Tensors& b, const c10d::AllgatherOptions& o) override { auto x = hosts(a); auto y = hosts(b); return in->allgather_into_tensor_coalesced(x, y, o); }
  W gather(std::vector<Tensors>& a, Tensors& b, const c10d::GatherOptions& o) override { auto x = hosts2(a); auto y = hosts(b); return in->gather(x, y, o); }
  W scatter(Tensors& a, std::vector<Tensors>& b, const c10d::ScatterOptions& o) override { auto x = hosts(a); auto y = hosts2(b); return in->scatter(x, y, o); }
  W _reduce_scatter_base(at::Tensor& a, at::Tensor& b, const c10d::ReduceScatterOptions& o) override { auto x = host(a); auto y = host(b); return in->_reduce_scatter_base(x, y, o); }
  W reduce_scatter(Tensors& a, std::vector<Tensors>& b, const c10d::ReduceScatterOptions& o) override { auto x = hosts(a); auto y = hosts2(b); return in->reduce_scatter(x, y, o); }
  W reduce_scatter_tensor_coalesced(Tensors& a, Tensors& b, const c10d::ReduceScatterOptions& o) override { auto x = hosts(a); auto y = hosts(b); return in->reduce_scatter_tensor_coalesced(x, y, o); }
  W alltoall_base(at::Tensor& a, at::Tensor& b, std::vector<int64_t>& p, std::vector<int64_t>& q, const c10d::AllToAllOptions& o) override { auto x = host(a); auto y = host(b); return in->alltoall_base(x, y, p, q, o); }
  W alltoall(Tensors& a, Tensors& b, const c10d::AllToAllOptions& o) override { auto x = hosts(a); auto y = hosts(b); return in->alltoall(x, y, o); }
  W send(Tensors& t, int r, int g) override { auto h = hosts(t); return in->send(h, r, g); }
  W recv(Tensors& t, int r, int g) override { auto h = hosts(t); return in->recv(h, r, g); }
  W barrier(const c10d::BarrierOptions& o) override { return in->barrier(o); }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
};
c10::intrusive_ptr<c10d::Backend> alias(const c10::intrusive_ptr<c10d::Backend>& inner, std::string name, bool reduces) {
  return c10::make_intrusive<Aliasing>(inner, std::move(name), reduces);
}
}  // namespace

PYBIND11_MODULE(fakedev, m) {
  m.def("register_hooks", [] { if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(&g_hooks); });
  m.def("set_count", [](int n) { g_count = n; });
  m.def("count", [] { return g_count; });
  m.def("current", [] { return int(t_device); });
  m.def("set_current", [](int i) { t_device = i; });
  m.def("default_generator", [](int i) { return defaults()[i]; });
  m.def("seen", [] { std::lock_guard<std::mutex> l(g_mutex); return g_seen; });
  m.def("only", [](const std::vector<std::string>& names) { std::lock_guard<std::mutex> l(g_mutex); g_native = {names.begin(), names.end()}; });
  m.def("set_float64", [](bool has) { g_has_float64 = has; });
  m.def("num_late", [] { return g_num_late; });
  m.def("alias", &alias);
}
