"""What users of the first implementation of MoQ (DeepSpeed) complained about, and where moq is held
to the opposite.

| # | thread | complaint | test |
|---|---|---|---|
| 1 | DeepSpeed #1454 | what MoQ trained cannot be loaded for INT8 inference | end_to_end/test_examples::test_an_example_trains_reports_exports_and_serves, inference/test_exported::test_llama_logits_equal_the_simulated_model |
| 2 | #1833 | the INT8 kernels were never released | inference half: inference/test_int8::test_decoder_equals_the_model_with_simulated_weights |
| 3 | #1464, #4371 | kernels of the announcement are not in the code | inference half: likewise, and tests/benchmarks |
| 4 | bloom-inference #79, #2217 | INT8 is slower than FP16 | inference half: inference/test_int8::test_int8_weights_are_not_slower_than_floats, on a GPU tests/benchmarks/gpu_decode.py |
| 5 | #8577 | INT8 is advertised and refused | inference half: end_to_end/test_readme::test_the_engine_has_the_simulated_models_perplexity |
| 6 | #7092, #7091 | a MoQ configuration quantizes nothing and says nothing | training/test_ancestors_defects::test_nothing_quantized_is_said, training/test_rules::test_a_rule_that_matches_nothing_is_an_error_that_says_what_is_near |
| 7 | #3626 | the configuration moved, and its old place is ignored | training/test_deepspeed::test_a_configuration_of_deepspeed_given_as_moqs_is_sent_to_its_reader, training/test_deepspeed::test_keys_without_meaning_are_listed |
| 8 | transformers #25582 | nonsense is accepted, with the same result | training/test_config::test_a_wrong_value_is_an_error_that_names_the_key, training/test_deepspeed::test_what_deepspeed_would_have_swallowed_is_refused |
| 9 | #2054 | MoQ crashes in FP32 | training/test_ancestors_defects::test_float32_has_schedule_blend_and_stochastic_rounding_together, training/test_optimizer_torch::test_autocast_trains_float32_weights |
| 10 | #1837 | no quantizer where the optimizer is the user's own | training/test_inner_optimizers::test_masters_follow_the_plain_optimizer_when_gradients_are_the_same |
| 11 | #2608, #3334, Examples #239, #716 | the "compressed" model is not smaller, nor faster | training/test_ancestors_defects::test_an_exported_checkpoint_is_smaller, export/test_inspect::test_eight_bits_take_a_quarter_of_fp32; faster: inference half |
| 12 | #2239, #2283 | a compressed BERT is slower | inference half: tests/benchmarks/gpu_encoder.py; a compiled training: training/test_compile::test_a_run_with_four_drops_compiles_once |
| 13 | #2301, #2326, Examples #508 | nobody says how to run what was trained | end_to_end/test_readme::test_torchrun_serves_the_simulated_models_greedy_text, end_to_end/test_docs_train::test_the_loop_trains_and_exports |
| 14 | #1788, #2956, #2923, #2865 | INT8 fails on GPT-2, GPT-J, BLOOM | inference half: inference/test_exported::test_other_decoders_equal_the_simulated_model |
| 15 | #2876, #2770 | sharded INT8 checkpoints give garbage | inference half: inference/test_parallel_quantized::test_logits_are_those_of_one_rank |
| 16 | #2467 | INT8 takes more memory than FP16 | inference half: inference/test_gpu_memory::test_int8_weights_take_a_byte_each; in training: training/test_memory::test_one_copy_of_the_weights_is_kept |
| 17 | #2217, Examples #611 | no products of INT8 activations | training/test_activations::test_the_engine_multiplies_what_training_saw |
| 18 | #2526, #4351, #4393 | no 4 bits, no width per matrix | training/test_rules::test_layers_with_several_widths_become_several_blocks, export/test_export_equals_simulated::test_stored_codes_are_the_simulated_weights |
| 19 | #1466, #1797, #1967, #2309, #3960 | padded batches give wrong outputs | inference half: inference/test_ragged::test_padded_rows_equal_each_row_alone |
| 20 | #2230, #2729, #2730, #3511 | logits far from those of the model | inference half: inference/test_architectures::test_decoder_logits_equal_transformers; of what was trained: training/test_activations::test_the_engine_answers_as_the_trained_model |
| 21 | #1125, #2062, #2300, #3758, #4684 | longer or larger batches than the first crash | inference half: inference/test_errors::test_cache_refuses_tokens_beyond_its_capacity, inference/test_generation::test_prompts_longer_than_a_chunk_are_read_in_pieces |
| 22 | #2506, #3350, #4515 | no reordered rows, past keys ignored | inference half: inference/test_ragged::test_reordered_rows_continue_their_sources |
| 23 | #2456, #8330, #8271 | no CUDA graphs | inference half: inference/test_gpu::test_a_captured_step_serves_the_next_generations_too; of training: training/test_optimizer_cuda::test_a_captured_step_replays_across_bit_drops |
| 24 | #2421, #2442, #3644, #4052, #5592, #6617 | each rank loads the whole model | inference half: inference/test_parallel::test_a_ranks_peak_memory_is_about_its_share |
| 25 | #1410, #1192, #3634, #4893, #3271, #2954, #3139, #2607, #3171 | a second model is gibberish; heads that ranks do not divide; no BF16; failing builds | below; inference half: inference/test_parallel::test_more_ranks_than_heads_are_refused_naming_the_largest_degree; training/test_optimizer_torch::test_masters_of_bfloat16_weights_are_float32_unless_told_otherwise; packaging/test_build::test_build_refuses_an_old_torch_before_compiling |
"""  # noqa: E501

import re
from pathlib import Path

import pytest
from tiny_decoder import assert_same, assert_simulated, train_step, weights, wrap

TESTS = Path(__file__).parents[1]
CONFIGS = (
    {"start_bits": 9, "target_bits": 4, "rounding": "stochastic", "seed": 1},
    {"start_bits": 8, "target_bits": 3, "activations": "static", "granularity": "per_tensor"},
    {"start_bits": 6, "target_bits": 4, "simulate": "autograd", "scale": "learned"},
)


@pytest.mark.parametrize("named", sorted(set(re.findall(r"\w+/test_\w+::test_\w+", __doc__))))
def test_the_table_names_a_test_that_there_is(named):
    module, test = named.split("::")
    assert f"\ndef {test}(" in (TESTS / f"{module}.py").read_text()


def test_the_table_has_every_complaint():
    rows = [line.split("|") for line in __doc__.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[1]) for row in rows] == list(range(1, 26))
    assert all("::" in row[4] or "tests/benchmarks" in row[4] for row in rows)


def test_several_trainings_of_one_process_are_each_as_alone(decoder, device):
    """There what the first model had set up was the second one's too."""

    def begun(number):
        model = decoder(layers=1 + number % 2, hidden=8 + 4 * number).to(device)
        return model, wrap(model, CONFIGS[number], total_steps=8)

    together = [begun(number) for number in range(3)]
    for step in range(8):
        for number, (model, optimizer) in enumerate(together):
            train_step(model, optimizer, step + 10 * number)
    for number, (model, optimizer) in enumerate(together):
        alone, reference = begun(number)
        for step in range(8):
            train_step(alone, reference, step + 10 * number)
        assert optimizer.num_bits == reference.num_bits
        assert set(optimizer.num_bits.values()) == {CONFIGS[number]["target_bits"]}
        if "simulate" not in CONFIGS[number]:
            assert_simulated(optimizer)
        if device == "cpu":
            assert_same(weights(model), weights(alone))
        for value, expected in zip(model.parameters(), alone.parameters(), strict=True):
            # Sums of a GPU need not repeat, and a code may fall to the other side.
            far = (value - expected).detach().abs() > 1e-3
            assert far.float().mean() <= 0.05
