// A CUDA device for a CPU build of PyTorch. Its memory is the host's and counted, its kernels are the CPU's, tensors of
// two devices are refused as CUDA refuses them, and what would make the host wait for a device is told to Python.
//
// Registered for the CUDA dispatch key: an allocator, a device guard (with which autograd starts its device thread), the
// hooks that torch asks for devices and generators, the few operators that must know storages, and one boxed fallback for
// all others. Loaded before `import torch`, which asks for the hooks once.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

using namespace at;
namespace py = pybind11;

// ------------------------------------------------------------------------------------------------ memory

// In blocks of 512 bytes, as CUDA's caching allocator counts. Pages come from the kernel, zero and not yet there, so that
// tensors of real widths cost nothing until they are written; `poison` fills them with NaN instead. Every block has the
// label that was set when it was allocated, and the bytes of each label at the peak are kept.
struct Block {
  size_t size;
  int label;
};

struct Memory {
  std::mutex lock;
  std::unordered_map<void*, Block> blocks;
  int64_t now = 0, peak = 0, limit = 0;
  int label = 0;
  std::vector<int64_t> labelled = std::vector<int64_t>(32), at_peak = labelled;
  bool poison = true;

  void mark_peak() {
    peak = now;
    at_peak = labelled;
  }
};
static Memory memory;

static void release(void* start) {
  if (!start) return;
  std::lock_guard<std::mutex> held(memory.lock);
  const auto found = memory.blocks.find(start);
  const Block block = found->second;
  memory.now -= block.size;
  memory.labelled[block.label] -= block.size;
  munmap(start, block.size);
  memory.blocks.erase(found);
}

struct Blocks final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    const Device device(kCUDA, 0);
    if (!bytes) return {nullptr, nullptr, &release, device};
    const size_t size = (bytes + 511) / 512 * 512;
    std::lock_guard<std::mutex> held(memory.lock);
    TORCH_CHECK_WITH(OutOfMemoryError, !memory.limit || memory.now + int64_t(size) <= memory.limit,
                     "CUDA out of memory. Tried to allocate ", size, " bytes beside ", memory.now, " of ", memory.limit);
    void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "the host has no ", size, " bytes for the pretended device");
    if (memory.poison) memset(start, 0xff, bytes);
    memory.blocks[start] = {size, memory.label};
    memory.now += size;
    memory.labelled[memory.label] += size;
    if (memory.now > memory.peak) memory.mark_peak();
    return {start, start, &release, device};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
static Blocks allocator;

// ------------------------------------------------------------------------------------------------ device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return {kCUDA, 0}; }
  Device getDevice() const override { return {kCUDA, 0}; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, {kCUDA, 0}); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, {kCUDA, 0}); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, {kCUDA, 0}); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, {kCUDA, 0}); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  Allocator* getPinnedMemoryAllocator() const override { return getCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return {kCUDA, 0}; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)  // the name is the key

// ------------------------------------------------------------------------------------------------ what is told

static std::map<std::string, int64_t> launches;  // by operator
static std::mutex counting;
static py::object* listener = nullptr;           // called with (what, operator, bytes)
static thread_local bool inside = false;         // of a kernel, whose own copies are no transfers

static void tell(const char* what, const std::string& op, int64_t bytes = 0) {
  if (!listener || inside) return;
  py::gil_scoped_acquire gil;
  (*listener)(what, op, bytes);
}

static void launched(const std::string& op) {
  std::lock_guard<std::mutex> held(counting);
  launches[op] += 1;
}

// ------------------------------------------------------------------------------------------------ storages and copies

// the same memory as a tensor of the CPU
static Tensor host_view(const Tensor& t) {
  if (!t.is_cuda()) return t;
  void* start = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  return from_blob(start, t.sizes(), t.strides(), t.options().device(kCPU).requires_grad(false));
}

static ScalarType element_type(std::optional<ScalarType> dtype) {
  return dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
}

static Tensor make_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
                    std::optional<bool> pinned, std::optional<MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_generic(size, &allocator, keys, element_type(dtype), format);
}

static Tensor make_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                            std::optional<Device>, std::optional<bool>) {
  const DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, element_type(dtype));
}

static void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  DataPtr fresh = allocator.allocate(bytes);
  if (bytes && storage->nbytes()) memcpy(fresh.get(), storage->data(), std::min(bytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

static const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t needed = (self.numel() + self.storage_offset()) * self.element_size();
  if (needed > self.storage().nbytes()) resize_storage(self.storage().unsafeGetStorageImpl(), needed);
  return self;
}

static Tensor& set_at(Tensor& self, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(source.device().is_cuda(), "set_: storage is on ", source.device(), ", tensor on ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr || stride.size() != size.size()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  return self;
}

static Tensor& set_storage(Tensor& self, Storage source) {
  const int64_t elements = source.nbytes() / self.dtype().itemsize();
  return set_at(self, source, 0, {elements}, {});
}

static Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

static Scalar read_number(const Tensor& self) {
  tell("wait", "item");
  return at::_local_scalar_dense(host_view(self));
}

static void move(const Tensor& to, const Tensor& from) {
  at::NoGradGuard guard;
  host_view(to).copy_(host_view(from));
}

static Tensor& copy_tensor(Tensor& self, const Tensor& source, bool non_blocking) {
  if (source.is_cuda() && !self.is_cuda()) tell(non_blocking ? "download" : "wait", "copy to the host", source.nbytes());
  if (!source.is_cuda() && self.is_cuda()) tell(non_blocking ? "upload" : "wait", "copy to the device", source.nbytes());
  move(self, source);
  return self;
}

static Tensor copy_from(const Tensor& self, const Tensor& into, bool) {
  move(into, self);
  return into;
}

static Tensor copy_from_and_resize(const Tensor& self, const Tensor& into) {
  if (into.sizes() != self.sizes()) resize_(into, self.sizes(), std::nullopt);
  move(into, self);
  return into;
}

// of at::SDPBackend: efficient_attention, which Python implements; math for what it does not take on CUDA either
static int64_t kind_of_attention(const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>&, double,
                                 bool, std::optional<double>, bool) {
  return query.scalar_type() == kDouble ? 0 : 2;
}

static void assert_async(const Tensor& condition, std::string_view message) {
  TORCH_CHECK(host_view(condition).item<bool>(), "device-side assert: ", std::string(message));
}

// ------------------------------------------------------------------------------------------------ all other operators

// their result has a size that the host must know
static const std::unordered_set<std::string> waits = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::equal",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "aten::is_nonzero", "aten::histc",
    "aten::repeat_interleave"};
// indices may lie on the host, which uploads them; of a mask it must know how many it holds
static const std::unordered_set<std::string> by_index = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                                         "aten::index_put", "aten::_unsafe_index"};
// the CPU multiplies integers, CUDA does not
static const std::unordered_set<std::string> products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
                                                         "aten::addmm_", "aten::addmv", "aten::mv", "aten::dot"};

struct Given {
  std::vector<Tensor> tensors;
  bool has_mask = false;  // among indices
  bool from_host = false;  // an index
};

static Given tensors_of(const torch::jit::Stack& stack, size_t count) {
  Given given;
  for (const auto& value : torch::jit::last(stack, count)) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) given.tensors.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) given.tensors.push_back(t);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
        if (!t || !t->defined()) continue;
        given.tensors.push_back(*t);
        given.has_mask |= t->scalar_type() == kBool || t->scalar_type() == kByte;
        given.from_host |= t->is_cpu();
      }
    }
  }
  return given;
}

static void refuse_two_devices(const std::string& name, const std::vector<Tensor>& tensors) {
  bool on_device = false, on_host = false;
  for (const Tensor& t : tensors) {
    on_device |= t.is_cuda();
    on_host |= t.is_cpu() && t.dim() > 0;  // a number may come from the host
  }
  if (!on_device || !on_host || (by_index.count(name) && tensors[0].is_cuda())) return;
  std::string found;
  for (const Tensor& t : tensors) found += " " + t.device().str() + c10::str(t.sizes());
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", name, " got", found);
}

static void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().operator_name().name;
  const Given given = tensors_of(*stack, op.schema().arguments().size());
  refuse_two_devices(name, given.tensors);
  const bool by_mask = given.has_mask && by_index.count(name);
  const bool from_host = given.from_host && by_index.count(name);
  const char* how = by_mask ? " by a mask" : from_host ? " by an index of the host" : "";
  if (waits.count(name) || by_mask || from_host) tell("wait", name.substr(6) + how);
  if (products.count(name)) {
    for (const Tensor& t : given.tensors) {
      TORCH_CHECK(at::isFloatingType(t.scalar_type()), "\"", name, "_cuda\" not implemented for ", t.scalar_type());
    }
  }
  launched(name);
  const bool before = inside;
  inside = true;
  try {
    at::native::cpu_fallback(op, stack, false);
  } catch (...) {
    inside = before;
    throw;
  }
  inside = before;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(make_empty));
  m.impl("empty_strided", TORCH_FN(make_strided));
  m.impl("as_strided", [](const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  m.impl("view", [](const Tensor& self, IntArrayRef size) { return at::native::view(self, size); });
  m.impl("_reshape_alias", [](const Tensor& self, IntArrayRef size, IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  m.impl("unfold", [](const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
    return at::native::unfold(self, dimension, size, step);
  });
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_at));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("_local_scalar_dense", TORCH_FN(read_number));
  m.impl("copy_", TORCH_FN(copy_tensor));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_fused_sdp_choice", TORCH_FN(kind_of_attention));
  m.impl("_assert_async.msg", TORCH_FN(assert_async));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kCUDA, &allocator);
  m.def("listen", [](py::object f) { listener = f.is_none() ? nullptr : new py::object(f); });
  m.def("allocated", [] { return memory.now; });
  m.def("peak", [] { return memory.peak; });
  m.def("reset_peak", [] { memory.mark_peak(); });
  m.def("label", [](int label) { return std::exchange(memory.label, label); }, "0 to 31, of what is allocated from now on");
  m.def("relabel", [](const Tensor& t, int label) {
    const auto found = memory.blocks.find(t.storage().mutable_data());
    if (found == memory.blocks.end()) return;  // a storage without bytes
    memory.labelled[found->second.label] -= found->second.size;
    found->second.label = label;
    memory.labelled[label] += found->second.size;
  });
  m.def("blocks", [] {
    std::map<int64_t, int64_t> found;
    for (const auto& [start, block] : memory.blocks) found[reinterpret_cast<int64_t>(start)] = block.size;
    return found;
  }, "address -> bytes of what is allocated");
  m.def("at_peak", [] { return memory.at_peak; }, "bytes by label");
  m.def("limit", [](int64_t bytes) { memory.limit = bytes; }, "0: none");
  m.def("poison", [](bool on) { memory.poison = on; });
  m.def("launches", [] { return launches; });
  m.def("resize_storage", [](py::object storage, int64_t bytes) {
    resize_storage(torch::createStorage(storage.ptr()).unsafeGetStorageImpl(), bytes);
  });
  m.def("host_view", [](const Tensor& t) { return host_view(t); });
}
