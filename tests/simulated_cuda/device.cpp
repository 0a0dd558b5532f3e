// A CUDA device for a CPU build of torch. Its memory is the CPU's and its kernels are the CPU's, so values are real; that
// it is another device is real too: operations on tensors of two devices raise, and what blocks the host is reported.
#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {
const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

// ---- Reports: a callback into Python, with what blocks ("item", "D2H", "nonzero" ...). ----
using Report = void (*)(const char*);
std::atomic<Report> report{nullptr};
void blocks(const std::string& what) {
  if (Report call = report.load()) call(what.c_str());
}

// ---- Memory ----
std::atomic<int64_t> allocated{0}, peak{0};
struct Block {  // what a tensor on the device owns
  c10::DataPtr data;
  c10::Storage storage;  // of a result that a CPU kernel allocated
  int64_t size;
};
c10::DataPtr own(Block* block, void* pointer) {
  int64_t now = allocated += block->size, before = peak.load();
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
  return {pointer, block, [](void* context) {
    auto* owned = static_cast<Block*>(context);
    allocated -= owned->size;
    delete owned;
  }, kDevice};
}
struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* block = new Block{c10::GetCPUAllocator()->allocate(size), {}, static_cast<int64_t>(size)};
    return own(block, block->data.get());
  }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
} device_allocator;
struct PinnedAllocator final : c10::Allocator {
  static inline std::set<const char*> begins;
  static inline std::mutex mutex;
  c10::DataPtr allocate(size_t size) override {
    auto* data = new c10::DataPtr(c10::GetCPUAllocator()->allocate(size));
    std::lock_guard<std::mutex> lock(mutex);
    begins.insert(static_cast<const char*>(data->get()));
    return {data->get(), data, [](void* context) {
      auto* owned = static_cast<c10::DataPtr*>(context);
      { std::lock_guard<std::mutex> hold(mutex); begins.erase(static_cast<const char*>(owned->get())); }
      delete owned;
    }, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
} pinned_allocator;
bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(PinnedAllocator::mutex);
  return PinnedAllocator::begins.count(static_cast<const char*>(pointer)) > 0;
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<c10::Device*>(&kDevice);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override { blocks("synchronize"); }
  void synchronizeStream(const c10::Stream&) const override { blocks("synchronize"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

// ---- Tensors: an alias on the CPU for the kernel's arguments, and its results on the device. ----
at::Tensor on_device(c10::Storage storage, const at::Tensor& like) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                                      like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}
at::Tensor view(const at::Tensor& base, const at::Tensor& like) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(),
                                                      like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}
c10::Storage moved(const c10::Storage& storage) {
  auto* block = new Block{{}, storage, static_cast<int64_t>(storage.nbytes())};
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), own(block, storage.mutable_data()), &device_allocator, true};
}
at::Tensor alias(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(storage.mutable_data(), c10::Device(c10::DeviceType::CPU)), c10::GetCPUAllocator(), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                      tensor.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return out;
}

class Call {  // of a CPU kernel on tensors of the device
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op) {}

  void run(torch::jit::Stack* stack) {
    const auto& schema = op_.schema();
    const size_t count = schema.arguments().size();
    for (auto& value : torch::jit::last(*stack, count)) const_cast<c10::IValue&>(value) = argument(value);
    if (!pairs_.empty() && mixed_) raise();
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    for (auto& [original, same] : pairs_) resized(original, same);
    if (pairs_.empty() && !device_) return;
    for (auto& value : torch::jit::last(*stack, schema.returns().size())) const_cast<c10::IValue&>(value) = result(value);
  }

 private:
  c10::IValue argument(const c10::IValue& value) {
    if (value.isTensor()) return argument(value.toTensor());
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = true;
      return c10::Device(c10::DeviceType::CPU);
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor tensor : value.toTensorList()) list.push_back(argument(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<at::Tensor>(index(*tensor)) : std::nullopt);
      return list;
    }
    return value;
  }
  at::Tensor argument(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    shapes_ += " " + std::string(tensor.is_cuda() ? "cuda:0" : "cpu") + c10::str(tensor.sizes());
    if (!tensor.is_cuda()) {
      mixed_ = mixed_ || tensor.dim() > 0;
      return tensor;
    }
    pairs_.emplace_back(tensor, alias(tensor));
    return pairs_.back().second;
  }
  at::Tensor index(const at::Tensor& tensor) {  // one on the CPU is copied
    if (tensor.defined() && !tensor.is_cuda() && tensor.dim()) {
      blocks("H2D");
      return tensor;
    }
    return argument(tensor);
  }
  void raise() const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
                op_.schema().name(), shapes_, ")");
  }
  static void resized(const at::Tensor& original, const at::Tensor& same) {
    auto* impl = original.unsafeGetTensorImpl();
    if (same.storage().data() != original.storage().data())
      impl->set_storage_keep_dtype(moved(same.storage()));
    if (same.sizes() != original.sizes() || same.strides() != original.strides())
      impl->set_sizes_and_strides(same.sizes(), same.strides(), same.storage_offset());
  }
  c10::IValue result(const c10::IValue& value) {
    if (value.isTensor()) return result(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor tensor : value.toTensorList()) list.push_back(result(tensor));
    return list;
  }
  at::Tensor result(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [original, same] : pairs_)
      if (same.is_same(tensor)) return original;
    for (auto& [original, same] : pairs_)
      if (tensor.storage().data() && tensor.storage().data() == original.storage().data())
        return view(original, tensor);
    return on_device(moved(tensor.storage()), tensor);
  }

  const c10::OperatorHandle& op_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
  std::string shapes_;
  bool mixed_ = false, device_ = false;
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op).run(stack); }

void blocking(const c10::OperatorHandle& op, torch::jit::Stack* stack) {  // the result's size or value goes to the host
  const auto& name = op.schema().name();
  blocks(name == "aten::_local_scalar_dense" ? "item" : name.substr(6));
  Call(op).run(stack);
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!self.is_cuda() || !source.is_cuda()) {
    const at::Tensor& host = self.is_cuda() ? source : self;
    if (!non_blocking || !is_pinned(host.storage().data()))
      blocks(std::string(non_blocking && self.is_cuda() ? "staged " : "") + (self.is_cuda() ? "H2D" : "D2H"));
  }
  at::Tensor to = self.is_cuda() ? alias(self) : self;
  to.copy_(source.is_cuda() ? alias(source) : source);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "set_: a storage on ", source.device(), " for a tensor on ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}
at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const c10::SymInt count(static_cast<int64_t>(source.nbytes() / self.itemsize())), one(1);
  return set_storage(self, std::move(source), 0, c10::SymIntArrayRef(&count, 1), c10::SymIntArrayRef(&one, 1));
}
}  // namespace

namespace at {
using ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks);
}  // namespace at
static bool with_allocator = [] { c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator, 1); return true; }();

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
                           "unique_consecutive", "repeat_interleave.Tensor", "bincount"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&blocking>());
  // Composite for the CPU too, where it chooses the CPU's kernels.
  for (const char* name : {"convolution", "convolution_backward", "_convolution", "native_layer_norm", "native_group_norm"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  library.impl("copy_", &copy);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
}

extern "C" {
void simulated_cuda_report(Report call) { report = call; }
int64_t simulated_cuda_allocated() { return allocated; }
int64_t simulated_cuda_peak(bool reset) {
  const int64_t before = peak;
  if (reset) peak = allocated.load();
  return before;
}
}
