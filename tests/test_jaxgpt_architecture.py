"""The table of GPT-2 beside what others say: the Flax model, transformers' GPT-2, gguf's names."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from jaxgpt.shared import architecture
from jaxgpt.shared.config import ModelConfig

# Every size another one, so that no two dimensions can be exchanged unnoticed.
SHAPE = {"vocab_size": 97, "block_size": 29, "n_layer": 3, "n_head": 4, "n_embd": 24}
TIED = ModelConfig(**SHAPE)
UNTIED = ModelConfig(**SHAPE, tied=False)
ROTARY = ModelConfig(**SHAPE, positions="rotary")
TIES = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


@pytest.fixture
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


def gpt2_of(transformers: ModuleType, config: ModelConfig) -> Any:
    """Return transformers' GPT-2 of a configuration, with random weights."""
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            tie_word_embeddings=config.tied,
            **shape,
        )
    ).eval()


@pytest.mark.parametrize("config", [TIED, UNTIED, ROTARY], ids=["tied", "untied", "rotary"])
def test_flax_model_has_the_table_s_parameters(config: ModelConfig) -> None:
    from jaxgpt.training.model.params import abstract_params

    theirs = {name: each.shape for name, each in abstract_params(config).items()}
    assert {each.flax_name: each.hf_shape for each in architecture.parameters(config)} == theirs


@TIES
def test_transformers_model_has_the_table_s_parameters(transformers: ModuleType, config: ModelConfig) -> None:
    theirs = {name: tuple(each.shape) for name, each in gpt2_of(transformers, config).state_dict().items()}
    if config.tied:  # the state_dict lists the shared matrix under both names
        assert theirs.pop("lm_head.weight") == theirs["transformer.wte.weight"]
    assert {each.hf_name: each.hf_shape for each in architecture.parameters(config)} == theirs


@TIES
def test_transformers_conv1d_layers_are_the_transposed_ones(
    transformers: ModuleType, config: ModelConfig
) -> None:
    conv1d = transformers.pytorch_utils.Conv1D
    theirs = {
        f"{name}.weight"
        for name, module in gpt2_of(transformers, config).named_modules()
        if isinstance(module, conv1d)
    }
    assert {each.hf_name for each in architecture.parameters(config) if each.transposed} == theirs


@TIES
def test_a_linear_layer_s_input_is_the_output_of_its_norm_in_transformers(
    transformers: ModuleType, config: ModelConfig
) -> None:
    """Hooks tell which tensors modules take and give; a layer whose norm is None takes the output of none."""
    model = gpt2_of(transformers, config)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: object, given: Any, made: Any) -> None:
            inputs[name], outputs[name] = given[0], made

        return keep

    ours = architecture.layers(config)
    for layer in ours:
        whole = layer.name if layer.name == architecture.HEAD else architecture.HF_PREFIX + layer.name
        model.get_submodule(whole).register_forward_hook(hook(layer.name))
    model(torch.arange(5)[None])

    norms = architecture.norms(config)
    for layer in architecture.linear_layers(config).values():
        # The head may take a slice of the same memory.
        feeding = [n for n in norms if outputs[n].data_ptr() == inputs[layer.name].data_ptr()]
        assert feeding == ([layer.norm] if layer.norm else []), layer.name
        assert inputs[layer.name].shape[-1] == layer.inputs
        assert outputs[layer.name].shape[-1] == layer.outputs


@TIES
def test_parameters_come_in_the_order_of_the_computation(
    transformers: ModuleType, config: ModelConfig
) -> None:
    called: list[str] = []
    model = gpt2_of(transformers, config)
    for layer in architecture.layers(config):
        whole = layer.name if layer.name == architecture.HEAD else architecture.HF_PREFIX + layer.name
        model.get_submodule(whole).register_forward_hook(lambda *_, name=layer.name: called.append(name))
    model(torch.arange(5)[None])
    assert [layer.name for layer in architecture.layers(config)] == called


@TIES
def test_gguf_names_are_those_of_its_own_map_for_gpt2(config: ModelConfig) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for each in architecture.parameters(config):
        assert names.get_name(each.hf_name, try_suffixes=(".weight", ".bias")) == each.gguf_name


@TIES
def test_operations_of_a_token_are_six_for_each_parameter_of_transformers_and_twelve_for_attention(
    transformers: ModuleType, config: ModelConfig
) -> None:
    """6 N + 12 L C S, N without the tables that are only looked up: PaLM, arXiv:2204.02311, appendix B."""
    looked_up = {"transformer.wpe.weight"} | (set() if config.tied else {"transformer.wte.weight"})
    N = sum(
        parameter.numel()
        for name, parameter in gpt2_of(transformers, config).named_parameters()  # a tied matrix once
        if name not in looked_up
    )
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    assert architecture.flops_per_token(config) == 6 * N + attention


def test_rotary_model_lacks_the_table_of_positions_alone() -> None:
    learned = {each.name for each in architecture.parameters(TIED)}
    assert learned - {each.name for each in architecture.parameters(ROTARY)} == {"wpe.weight"}


def test_groups_are_matrices_of_blocks_tables_and_vectors() -> None:
    groups: dict[str, int] = {"matrix": 0, "embedding": 0, "vector": 0}
    for each in architecture.parameters(UNTIED):
        groups[each.group] += math.prod(each.shape)
    C, L, V, S = (SHAPE[name] for name in ("n_embd", "n_layer", "vocab_size", "block_size"))
    per_block = (3 * C + C + 4 * C + C) + 4 * C  # biases; gains and biases of two norms
    assert groups == {
        "matrix": L * 12 * C * C,
        "embedding": (2 * V + S) * C,
        "vector": L * per_block + 2 * C,
    }


def test_a_tied_head_multiplies_with_the_token_embedding_and_has_no_parameter() -> None:
    assert architecture.linear_layers(TIED)[architecture.HEAD].matrix == "wte"
    assert architecture.linear_layers(UNTIED)[architecture.HEAD].matrix == architecture.HEAD
    assert architecture.HEAD not in architecture.matrices(TIED)
    assert architecture.HEAD in architecture.matrices(UNTIED)
