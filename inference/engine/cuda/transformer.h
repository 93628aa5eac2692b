#pragma once

#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "inference/engine/cuda/decode_step.h"
#include "inference/engine/cuda/device_group.h"
#include "inference/engine/cuda/device_weights.h"
#include "inference/engine/cuda/paged_kv_cache.h"
#include "inference/engine/cuda/step_graph.h"
#include "inference/engine/cuda/step_inputs.h"
#include "inference/engine/cuda/workspace.h"
#include "inference/engine/transformer.h"
#include "inference/policies/parameter_map.h"
#include "kernels/decode_step.h"

namespace moq::inference {

struct CudaOptions {
  at::Device device = at::kCUDA;
  std::optional<std::string> compute_dtype;   ///< "fp16", "bf16", "fp32"; nullopt: see below
  std::optional<std::string> kv_cache_dtype;  ///< "int8"; nullopt: as the activations
  std::string group_name;                     ///< of several ranks' process group on GPUs
};

/// Loads a rank's share onto a GPU. Activations are kept in compute_dtype, or in the dtype of float
/// weights, or, with integer ones, in bfloat16 if the checkpoint's floats are, else in float16.
/// @throws moq::Error as load_weights, for an unknown option, for heads that no kernel computes,
///         for a GPU that moq was not built for, or if its memory does not hold the weights
std::unique_ptr<Transformer> open_cuda_transformer(
    const ParameterMap& parameters, const std::shared_ptr<const checkpoint::Checkpoint>& files,
    LoadOptions load, const CudaOptions& options,
    const std::shared_ptr<Communicator>& communicator);

namespace cuda {

/// Rows that a decode step of so many is computed with, so that few graphs serve all.
std::int64_t bucket_of(std::int64_t num_rows);

/// Whether steps are captured in CUDA graphs. MOQ_GPU_GRAPHS=0 forbids it.
bool uses_graphs();

/// A transformer on a GPU. Kernels are launched on a stream of its own, which waits for the
/// caller's current stream and is waited for by it. Calls are made within outside_captures().
///
/// After an error of the GPU itself nothing can be computed in this process: every call then says
/// so.
class CudaTransformer final : public Transformer {
 public:
  CudaTransformer(ModelSpec spec, Weights weights, std::shared_ptr<Communicator> communicator,
                  std::unique_ptr<DeviceGroup> group, at::Device device, DType dtype,
                  DType kv_dtype);
  ~CudaTransformer() override;

  at::Device device() const override { return device_; }
  std::unique_ptr<DeviceScope> outside_captures() const override;
  std::unique_ptr<DeviceScope> in_one_go() override;
  std::string compute_dtype() const override { return name_of(dtype_); }
  std::string kv_cache_dtype() const override { return name_of(kv_dtype_); }
  MemoryReport memory() const override;
  void release_graphs() override;
  std::vector<KernelRecord> decode_kernels() const override { return decode_kernels_; }
  std::unique_ptr<KvCache> make_cache(std::int64_t num_slots, std::int64_t capacity) override;
  KvCache& generation_cache(std::int64_t num_slots, std::int64_t capacity) override;
  at::Tensor new_result(at::IntArrayRef sizes) const override;
  void reserve(std::int64_t num_tokens) override;
  void reserve_logits(std::int64_t num_tokens) override;
  void forward(const TokenBatch& batch, KvCache* cache) override;
  void hidden_state(const at::Tensor& out) override;
  void logits(const at::Tensor& out) override;
  void pooled(const TokenBatch& batch, const at::Tensor& out) override;
  void classify(const at::Tensor& pooled, const at::Tensor& out) override;
  std::span<const std::int64_t> next_tokens(
      const TokenBatch& batch, KvCache& cache, std::span<const std::int64_t> rows,
      std::span<const kernels::SamplingRow> sampling) override;

 private:
  class HandOver;
  class OnDevice;

  /// What the kernels of a forward pass are told about the batch.
  struct Step {
    const StepInputs& inputs;
    std::int64_t num_tokens;
    std::int64_t num_decoding;  ///< sequences of one token, which come first
    std::int64_t num_longer;    ///< the others
    std::int64_t max_tokens;    ///< of those
    std::int64_t num_keys;      ///< of all sequences together, new ones included
    const PagedKvCache* cache;
  };

  PagedKvCache* checked(KvCache* cache) const;
  std::unique_ptr<PagedKvCache> new_cache(std::int64_t num_slots, std::int64_t capacity) const;
  KvCache& keep_cache(std::int64_t num_slots, std::int64_t capacity);
  Step begin_step(const TokenBatch& batch, PagedKvCache* cache,
                  const std::shared_ptr<StepInputs>& inputs);
  const std::shared_ptr<StepInputs>& eager_inputs(const TokenBatch& batch, std::int64_t num_rows);
  void reserve_rows(std::int64_t num_rows);
  void reserve_positions(std::int64_t num_positions);

  void send(const StepInputs& inputs);
  void run_layers(const Step& step);
  void embed(const Step& step, void* output);
  void attend(const void* input, const kernels::DeviceNorm& norm, const DeviceLayer& layer,
              std::int64_t index, const Step& step);
  kernels::DeviceAttentionArgs attention_over(const kernels::DevicePages& pages,
                                              std::int64_t row_width, const Step& step) const;
  void feed_forward(const void* input, const kernels::DeviceNorm& norm, const DeviceLayer& layer,
                    std::int64_t m);
  void add_attended(const DeviceLayer& layer, std::int64_t m);
  void add_inner(const DeviceLayer& layer, std::int64_t m);
  void project_and_add(const char* what, const void* input, const DeviceProjection& projection,
                       kernels::DeviceLinearArgs args);
  void linear(const char* what, const void* input, const kernels::DeviceNorm& norm,
              const DeviceProjection& projection, const kernels::DeviceLinearArgs& args);
  void multiply(const char* what, const kernels::DeviceLinearArgs& args);
  kernels::DeviceLinearArgs with_input(const void* input, const kernels::DeviceNorm& norm,
                                       const DeviceProjection& projection,
                                       kernels::DeviceLinearArgs args);
  float* shared_extents(kernels::DeviceNormArgs args);
  void normalize(const void* input, const kernels::DeviceNorm& norm, void* output, std::int64_t m,
                 const std::int32_t* rows = nullptr, bool float32_output = false);

  std::string decode_step_obstacle() const;
  void prepare_decode_step();
  bool takes_one_kernel(std::int64_t past_length) const;
  bool is_decode_step(const Step& step) const;
  void run_decode_step(const Step& step);

  /// Whether run_head() needs room of its own for tokens in a row.
  bool head_needs_room() const { return group_ != nullptr || spec_.head_transform; }
  std::int64_t logit_rows_at_once(std::int64_t num_tokens) const;
  void run_head(const void* input, const std::int32_t* rows, const at::Tensor& out);
  at::Tensor rows_of_x(std::int64_t count) const;
  void join_logits(const at::Tensor& out);

  void run_step(const Step& step, const std::int32_t* rows, std::int64_t count, bool all_greedy);
  void decode(const TokenBatch& batch, PagedKvCache& cache, std::int64_t bucket,
              std::span<const kernels::SamplingRow> sampling);
  void write_sampling(StepInputs& inputs, const TokenBatch& batch,
                      std::span<const std::int64_t> rows,
                      std::span<const kernels::SamplingRow> sampling);
  void write_history(std::int64_t slot, std::span<const std::int64_t> tokens);
  void take_tokens(std::span<const kernels::SamplingRow> sampling);
  StepGraph& graph_of(const StepGraph::Key& key);
  StepGraph* forward_graph(const TokenBatch& batch);
  template <typename Run>
  void capture(StepGraph& graph, const Run& run);
  /// (A graph in flight ends first, and last_inputs_ holds what it reads.)
  void drop_graphs() { graphs_.clear(); }

  template <typename Launch>
  void launch(const char* what, std::int64_t rows, std::int64_t columns, std::int64_t bytes,
              const Launch& launch);
  void note_failure();
  void synchronize(const char* what, std::int64_t num_tokens);

  at::Device device_;
  DType dtype_;
  DType kv_dtype_;
  c10::cuda::CUDAStream stream_;
  at::cuda::CUDAEvent before_;          ///< of OnDevice
  at::cuda::CUDAEvent after_;           ///< of HandOver
  int hand_overs_ = 0;                  ///< that there are, one within the other
  std::unique_ptr<DeviceGroup> group_;  ///< null with one rank
  DeviceWeights device_weights_;
  DecodeStepChoice decode_step_choice_ = DecodeStepChoice::kFastest;
  at::Tensor decode_state_;  ///< kernels::cuda::prepare_decode_step's; undefined: no such steps

  std::int64_t num_positions_ = 0;  ///< of the rotation's tables: a RotationTable's
  at::Tensor cos_;
  at::Tensor sin_;

  Workspace workspace_;
  at::Tensor x_;  ///< a view of the workspace's x: the last batch's tokens
  std::int64_t num_tokens_ = 0;
  std::int64_t max_rows_ = 0;  ///< whose logits there is room for:
  at::Tensor head_in_;         ///< [2, rows, hidden_size]
  at::Tensor logits_;          ///< [rows, vocab_size] float32
  at::Tensor own_logits_;      ///< [rows, widest share of the vocabulary] float32; several ranks
  at::Tensor all_logits_;      ///< [ranks, rows, widest share] float32; several ranks
  at::Tensor tokens_;          ///< [rows] int32, drawn
  at::Tensor pinned_tokens_;   ///< the same, in host memory
  std::shared_ptr<StepInputs> eager_inputs_;
  /// Of the last step, kept until the stream is known to have read them.
  std::shared_ptr<const StepInputs> last_inputs_;
  at::Tensor last_table_;   ///< likewise, of a cache
  bool in_flight_ = false;  ///< whether the stream may still read them

  std::unique_ptr<PagedKvCache> generation_cache_;
  at::Tensor
      seen_;  ///< [at least its slots, words of the vocabulary] int32: tokens that a slot has
  std::map<StepGraph::Key, StepGraph> graphs_;
  std::set<StepGraph::Key> seen_once_;  ///< shapes of forward passes that are captured next time
  std::vector<std::int64_t> drawn_;
  std::vector<KernelRecord> decode_kernels_;
  bool recording_ = false;  ///< whether launch() adds to them
  std::string failure_;     ///< why the engine is unusable
};

}  // namespace cuda
}  // namespace moq::inference
