// What a build of torch for CPUs lacks to compute with fake tensors on `cuda:0`, forward and backward: a guard of the
// current device and stream, hooks that say that there is a context, and an accelerator, which autograd's engine asks
// for. Nothing is computed; fake tensors have no values.
//
// It must be loaded before torch (LD_PRELOAD), because `getAccelerator` takes the place of torch's own, and the hooks
// are looked up once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <optional>

namespace {
using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// torch looks for a class of this name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
} // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool /*checked*/) {
  return c10::DeviceType::CUDA;
}
} // namespace at::accelerator
