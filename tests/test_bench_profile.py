"""Kernels by kind: real names, a step compiled for an H100 (gpu_step.hlo, cut), a profile of a real step."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxgpt_bench.common.step_rows import StepProfile
from jaxgpt_bench.profile import rates
from jaxgpt_bench.profile.hlo import Program
from jaxgpt_bench.profile.kinds import KINDS, PRODUCTS, is_update, kind_of
from jaxgpt_bench.profile.profile import describe, profile_steps, summarize
from jaxgpt_bench.profile.trace import Kernel, exclusive_times, record
from jaxgpt_bench.training.contestants import first_settings
from jaxgpt_bench.training.options import TrainingOptions
from test_bench_train_rows import SETTINGS, SHAPE

from jaxgpt.shared.console import parse
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.numerics import FLOAT32
from jaxgpt.training.step.compiled import CompiledTraining

NOTHING = Program("")


@pytest.fixture(scope="module")
def step() -> Program:
    return Program((Path(__file__).parent / "gpu_step.hlo").read_text())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize256x128x32_cublas",
            "products, tf32",
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "products, bf16"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize128x128x32_stage4", "products, fp16"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x256x8_stage3_ffma", "products, fp32"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "products, bf16"),
        ("nvjet_tss_256x128_64x4_1x2_h_bz_coopA_TNT", "products, bf16"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_TNN", "products, fp16"),
        ("nvjet_sm90_hss_320x128", "products, fp16"),
        ("nvjet_sss_tf32_128x256_TNT", "products, tf32"),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
            "products, bf16",
        ),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x256_16x3_nn_align4>", "products, tf32"),
        ("ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_32x3_nn", "products, bf16"),
        ("ampere_sgemm_64x32_sliced1x4_tn", "products, fp32"),
        ("turing_fp16_s1688gemm_fp16_128x128_ldg8_f2f_tn", "products, fp16"),
        ("volta_h884gemm_128x64_ldg8_nn", "products, fp16"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>", "products, bf16"),
        ("gemm_fusion_dot_29_0", "products, dtype unknown"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128",
            "attention forward",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128>", "attention backward"),
        ("void cudnn::fusion::convert_dq_to_16bits<true, __nv_bfloat16>", "attention backward"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention forward"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention backward"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention forward"),
        ("fmha_cutlassB_bf16_aligned_128x128_k128_sm80", "attention backward"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("input_add_reduce_fusion_13", "reductions"),
        ("input_multiply_reduce_select_transpose_fusion_16", "reductions"),
        ("loop_add_fusion_4", "elementwise"),
        ("loop_convert_multiply_fusion_1", "elementwise"),
        ("wrapped_convert_16", "elementwise"),
        ("input_transpose_fusion_102", "copies, transposes, slices"),
        ("loop_dynamic_update_slice_fusion", "copies, transposes, slices"),
        ("input_slice_fusion_2", "copies, transposes, slices"),
        ("input_scatter_fusion_9", "gathers, scatters"),
        ("triton_red_fused__log_softmax_nll_loss_forward_3", "reductions"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_backward_add_12", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("MemcpyD2D", "copies, transposes, slices"),
        ("Memset", "copies, transposes, slices"),
        ("some_kernel_of_tomorrow", "other"),
    ],
)
def test_a_kernels_name_tells_its_kind(name: str, kind: str) -> None:
    assert kind_of(name, None, NOTHING, gpu=True) == kind


@pytest.mark.parametrize(
    ("op", "kind", "gflops", "megabytes"),
    [
        # logits of a chunk of 4,096 tokens: 2 x 4096 x 50304 x 768; bf16 in, float32 out
        ("custom-call.3", "products, bf16", 316.49, 6.29 + 77.27 + 824.18),
        ("dot_product_attention_fwd.10", "attention forward", 4 * 32 * 12 * 1024**2 * 64 / 2e9, 202.9),
        ("dot_product_attention_bwd.16", "attention backward", 10 * 32 * 12 * 1024**2 * 64 / 2e9, 404.2),
        ("input_reduce_fusion", "reductions", 0, 824.18 + 2.10 + 0.02 + 0.05),
        ("loop_convert_fusion", "elementwise", 0, 824.18 + 412.09 + 0.10),
        ("loop_convert_fusion.1", "elementwise", 0, 12.58 + 6.29),  # one slice of eight is read
        ("loop_dynamic_update_slice_fusion", "copies, transposes, slices", 0, 2 * 12.58),  # and one written
        ("loop_select_fusion.6", "optimizer", 0, 7 * 7.08),  # AdamW: four arrays are read, three written
    ],
)
def test_the_hlo_tells_work_and_bytes(
    step: Program, op: str, kind: str, gflops: float, megabytes: float
) -> None:
    found = step[op]
    assert found is not None
    assert kind_of("a_kernel", found, step, gpu=True) == kind
    assert step.flops(found) / 1e9 == pytest.approx(gflops, rel=1e-3)
    assert step.bytes(found) / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert is_update(found, step) == (kind == "optimizer")


def test_the_hlo_tells_the_function_that_a_kernel_comes_from(step: Program) -> None:
    assert step["loop_convert_fusion_1"] is step["loop_convert_fusion.1"]  # by the kernel's name, too
    reduce = step["input_reduce_fusion"]
    assert reduce is not None
    assert step.source(reduce, "jaxgpt") == "training/model/loss.py:98 _cross_entropy"
    assert step.source(reduce, "no_such_package") == ""
    head = step["custom-call.3"]
    assert head is not None
    assert step.source(head, "jaxgpt/training") == "model/numerics.py:142 _product"
    assert step.source(head, "jaxgpt/training", ("numerics.py",)) == "model/gpt.py:204 logits_of"


def test_kernels_that_overlap_share_their_time_and_gaps_are_counted() -> None:
    spans = {"a": (0.0, 10.0), "b": (5.0, 10.0), "none": (7.0, 7.0), "c": (14.0, 20.0)}
    kernels = [Kernel(name, "", start, end) for name, (start, end) in spans.items()]
    times, idle = exclusive_times(kernels)
    assert times == [7.5, 2.5, 0, 6]
    assert idle == 4
    assert exclusive_times([]) == ([], 0)


def test_rows_hold_rates_and_shares_of_what_was_measured(step: Program) -> None:
    """A product in two kernels, run twice, is two products; what has no instruction is no part of a rate."""
    gemm, sums = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn", "cublasLt::splitKreduce_kernel<bf16>"
    ran = [  # in ms
        (gemm, "custom-call.3", 0.0, 0.4),
        (sums, "custom-call.3", 0.4, 0.5),
        ("input_reduce_fusion", "input_reduce_fusion", 0.5, 1.0),
        (gemm, "custom-call.3", 2.0, 2.4),
        (sums, "custom-call.3", 2.4, 2.5),
        ("nvjet_tst_1", "", 2.5, 2.6),
    ]
    found = describe([Kernel(name, op, 1e6 * a, 1e6 * b) for name, op, a, b in ran], step, gpu=True)
    profile = summarize(found, step, 2, {"bf16": 800e12}, 3e12, "NVIDIA H100 80GB HBM3")
    rows = {row.kind: row for row in profile.kinds}
    assert profile.step_ms == pytest.approx(2.6 / 2)
    assert sum(row.ms for row in profile.kinds) == pytest.approx(profile.step_ms)
    assert sum(row.share for row in profile.kinds) == pytest.approx(1)
    assert rows["no kernel"].ms == pytest.approx(0.5)  # from 1.0 to 2.0, in two steps
    assert profile.known == pytest.approx(1.5 / 1.6)
    products = rows["products, bf16"]
    assert products.ms == pytest.approx(0.55)
    assert products.tflops == pytest.approx(2 * 316.485 / 1.0, rel=1e-3)
    assert products.of_measured == pytest.approx(2 * 316.485 / 800, rel=1e-3)
    assert products.of_datasheet == pytest.approx(2 * 316.485 / 989.4, rel=1e-3)
    assert rows["reductions"].gb_s == pytest.approx(826.34 / 0.5, rel=1e-3)
    assert rows["reductions"].of_measured == pytest.approx(826.34 / 0.5 / 3000, rel=1e-3)
    first = profile.kernels[0]
    assert (first.name[:14], first.count, first.op) == ("sm90_xmma_gemm", 1, "custom-call.3")
    assert first.source == "model/gpt.py:204 logits_of"
    assert first.of_measured == pytest.approx(2 * 316.485 / 800 / 0.8, rel=1e-3)
    assert StepProfile.from_json(profile.to_json()) == profile


def test_the_kinds_of_a_real_step_add_up_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window from the first operation to the last lies within the time around the steps, and fills it."""
    monkeypatch.setattr(rates, "PRODUCT_SIZE", {"cpu": 128})
    monkeypatch.setattr(rates, "COPY_BYTES", {"cpu": 2**20})
    arguments = ["tiny", *map(str, (*SHAPE, *SETTINGS))]
    first = first_settings(parse(TrainingOptions, "jaxgpt-bench train", arguments))
    program = CompiledTraining(first.model, first.train, make_mesh("data=1", 1), FLOAT32)
    compiled = program.compile_step()
    state = program.first_state()
    batch = jax.device_put(np.zeros(program.batch_shape, np.int32), program.batch_sharding)
    walls = []

    def take_steps() -> None:
        nonlocal state
        started = time.perf_counter()
        for _ in range(5):
            state, _ = compiled(state, batch, batch)
        jax.block_until_ready(state)
        walls.append((time.perf_counter() - started) * 1e3)

    take_steps()
    profile = profile_steps(take_steps, 5, compiled)
    assert sum(row.ms for row in profile.kinds) == pytest.approx(profile.step_ms, rel=1e-6)
    # The host takes its time before the first operation and after the last.
    assert 0.5 * walls[-1] / 5 <= profile.step_ms <= 1.01 * walls[-1] / 5
    assert profile.known == 1
    kinds = {row.kind for row in profile.kinds}
    assert {"products, fp32", "reductions", "elementwise", "optimizer", "no kernel"} <= kinds
    assert all(kind in KINDS or kind.startswith(PRODUCTS) for kind in kinds)
    assert "other" not in kinds
    products = next(row for row in profile.kinds if row.kind == "products, fp32")
    assert products.tflops is not None
    # Of a step: 6 FLOPs a parameter and token, and attention's; nothing else multiplies.
    tokens, matrices, attention = 16 * 64, 12 * 32 * 32 + 1024 * 32, 12 * 32 * 64
    assert products.tflops * products.ms * 1e9 == pytest.approx(tokens * (6 * matrices + attention), rel=0.02)
    assert profile.memory_gb_s is not None
    assert profile.memory_gb_s > 0
    assert profile.product_tflops["fp32"] > 0


GPU_PROFILE = """
planes {
  name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "train" } }
}
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute,MemcpyH2D)"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 stats { metadata_id: 1 ref_value: 2 } }
    events { metadata_id: 2 offset_ps: 6000000 duration_ps: 1000000 }
    events { metadata_id: 2 offset_ps: 8000000 duration_ps: 0 }
  }
  lines { name: "XLA Ops" events { metadata_id: 3 duration_ps: 4000000 } }
  event_metadata { key: 1 value { id: 1 name: "input_reduce_fusion" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyH2D" } }
  event_metadata { key: 3 value { id: 3 name: "again" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "input_reduce_fusion.3" } }
}
"""


def test_a_gpus_kernels_are_read_from_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As XLA's profiler writes them: kernels by stream, the instruction as a reference to a name."""

    @contextlib.contextmanager
    def trace(folder: str, **_: object) -> Iterator[None]:
        yield
        written = jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_PROFILE)
        (Path(folder) / "gpu.xplane.pb").write_bytes(written)

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert record(lambda: None) == [
        Kernel("input_reduce_fusion", "input_reduce_fusion.3", 1000.0, 5000.0),
        Kernel("MemcpyH2D", "", 7000.0, 8000.0),
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(RuntimeError, match="saw no kernel"):
        record(lambda: None)
