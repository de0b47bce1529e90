// A second device for the tests, where there is no accelerator: its memory is the host's, but torch treats it as
// another device. Every operation without a kernel of its own runs on the CPU over copies, after the checks that an
// accelerator would make: tensors and generators of another device are refused, and whatever brings a value to the
// host is counted and, on request, refused. Modes: a device without float64 (as MPS), one without a generator (as XLA).

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_copy_from_and_resize_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

using at::Tensor;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;

std::atomic<int64_t> reads{0};
std::atomic<bool> reads_refused{false};
std::atomic<bool> has_float64{true};
std::atomic<bool> has_generator{true};
thread_local bool inside_fallback = false;  // copies that the fallback makes are not the caller's

void read(const char* what) {
  if (inside_fallback) return;
  ++reads;
  TORCH_CHECK(!reads_refused, "stand_in: ", what, " waits for the device here.");
}

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(has_float64 || (dtype != at::kDouble && dtype != at::kComplexDouble),
                   "stand_in: the device has no float64.");
}

// ---- memory ------------------------------------------------------------------------------------------------------

void release(void* data) { std::free(data); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &release, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(kDevice, &memory);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(kDevice, 0); }
  c10::Device getDevice() const override { return c10::Device(kDevice, 0); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDevice, 0));
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDevice, 0));
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDevice, 0));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random numbers ----------------------------------------------------------------------------------------------

// Draws the CPU's numbers, but belongs to the device.
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();

  DeviceGenerator() : c10::GeneratorImpl({kDevice, 0}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "stand_in: a generator has no offset."); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "stand_in: a generator has no offset."); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator();
    copy->inner = inner.clone();
    return copy;
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<DeviceGenerator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    TORCH_CHECK(has_generator, "stand_in: the device has no generator.");
    return at::make_generator<DeviceGenerator>();
  }
  at::Device getDeviceFromPtr(void*) const override { return {kDevice, 0}; }
};

const bool hooked = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// ---- kernels of its own: memory, copies, views --------------------------------------------------------------------

Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

// The same memory, seen as a CPU tensor.
Tensor on_host(const Tensor& value) {
  if (value.is_cpu()) return value;
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), value.storage().nbytes(),
                              c10::DataPtr(value.storage().mutable_data(), c10::Device(c10::kCPU)), nullptr, false);
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                       c10::DispatchKeySet(c10::DispatchKey::CPU), value.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(value.sizes(), value.strides(), value.storage_offset());
  return host;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (to.is_cpu() && !self.is_cpu()) read("a copy to the host");
  on_host(to).copy_(on_host(self));
  return to;
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == sizes) return self;
  auto fresh = empty(size, self.scalar_type(), std::nullopt, std::nullopt, std::nullopt, format);
  const auto kept = std::min(self.storage().nbytes(), fresh.storage().nbytes());
  if (kept) std::memcpy(fresh.storage().mutable_data(), self.storage().data(), kept);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides());
  return self;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                    offset.expect_int());
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  read("reading a number");
  return on_host(self).item();
}

void check_tensor(const Tensor& value, const std::string& name) {
  if (!value.defined() || value.device().type() == kDevice) return;
  TORCH_CHECK(value.is_cpu() && value.dim() == 0, "Expected all tensors to be on the same device, but ", name,
              " got one on stand_in:0 and one on ", value.device(), ".");
}

// torch asks backends for convolutions of their own.
Tensor to_device(const Tensor& value) { return value.defined() ? value.to(c10::Device(kDevice, 0)) : value; }

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  for (const auto* value : {&input, &weight}) check_tensor(*value, "convolution");
  const bool biased = bias && bias->defined();
  if (biased) check_tensor(*bias, "convolution");
  return to_device(at::convolution_symint(on_host(input), on_host(weight),
                                          biased ? std::optional<Tensor>(on_host(*bias)) : std::nullopt, stride,
                                          padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  const std::vector<c10::SymInt> bias{weight.sym_size(transposed ? 1 : 0) * (transposed ? groups : c10::SymInt(1))};
  auto [of_input, of_weight, of_bias] =
      at::convolution_backward_symint(on_host(grad), on_host(input), on_host(weight), bias, stride, padding, dilation,
                                      transposed, output_padding, groups, wanted);
  return {to_device(of_input), to_device(of_weight), to_device(of_bias)};
}

// Its schema does not say that it writes the running statistics, so the fallback would lose them.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                              const std::optional<Tensor>& variance, bool training, double momentum,
                                              double eps) {
  check_tensor(input, "batch_norm");
  const auto host = [](const std::optional<Tensor>& value) -> std::optional<Tensor> {
    if (!value || !value->defined()) return std::nullopt;
    check_tensor(*value, "batch_norm");
    return on_host(*value);
  };
  auto [output, batch_mean, batch_scale] = at::native_batch_norm(
      on_host(input), host(weight), host(bias), host(mean), host(variance), training, momentum, eps);
  return {to_device(output), to_device(batch_mean), to_device(batch_scale)};
}

// ---- everything else: checked, then on the CPU ---------------------------------------------------------------------

bool depends_on_values(const std::string& name) {
  for (const auto* waits : {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
                            "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::is_nonzero"})
    if (name.rfind(waits, 0) == 0) return true;
  return false;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.operator_name().name +
      (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const auto arguments = schema.arguments().size();
  const auto first = stack->size() - arguments;
  for (size_t i = 0; i < arguments; ++i) {
    auto& value = (*stack)[first + i];
    const bool draws = schema.arguments()[i].name() == "generator";
    if (value.isTensor()) {
      check_tensor(value.toTensor(), name);
    } else if (value.isTensorList()) {
      for (const Tensor& item : value.toTensorList()) check_tensor(item, name);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& item : value.toOptionalTensorList()) {
        if (!item || !item->defined()) continue;
        check_tensor(*item, name);
        if (item->scalar_type() == at::kBool) read("picking by a mask");
      }
    } else if (value.isGenerator()) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().type() == kDevice, "Expected a 'stand_in' device type for generator but found '",
                  given.device(), "'.");
      value = static_cast<DeviceGenerator*>(given.unsafeGetGeneratorImpl())->inner;
    } else if (draws && value.isNone()) {
      value = static_cast<DeviceGenerator*>(default_generator().unsafeGetGeneratorImpl())->inner;
    }
  }
  if (depends_on_values(name)) read(name.c_str());
  struct Inside {
    bool before = inside_fallback;
    Inside() { inside_fallback = true; }
    ~Inside() { inside_fallback = before; }
  } inside;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY(stand_in, m) {
  m.def("reads() -> int", [] { return reads.load(); });
  m.def("refuse_reads(bool refused) -> ()", [](bool refused) { reads_refused = refused; });
  m.def("with_float64(bool available) -> ()", [](bool available) { has_float64 = available; });
  m.def("with_generator(bool available) -> ()", [](bool available) { has_generator = available; });
}
