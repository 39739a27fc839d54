"""The presets: model shapes with training settings that suit them."""

import dataclasses

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model shape (the vocabulary comes from the data) with training settings that suit it."""

    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    train: TrainConfig

    def model(self, vocab_size: int) -> ModelConfig:
        """Return the model configuration for a vocabulary."""
        return ModelConfig(vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd)


# `tiny` was tuned on two CPU cores (docs/training.md has the table). The others take what held there, and
# were not tuned: the rate of matrices stays, as Muon's updates have the same size at every width; that of
# embeddings falls with 1 / width, 0.02 at 128 channels (the tied table is the head, whose rate under Adam
# falls so: Yang et al. 2022, arXiv:2203.03466).
#
# From `gpt2` on rates of matrices, weight decay, betas, the rise of momentum and the share of decay are those
# published for Muon on 124M parameters at half a million tokens a step (modded-nanogpt's track of
# optimizers: 3,250 steps, of AdamW 4,950 to 5,625).
_LARGE = TrainConfig(
    max_steps=5000,
    batch_size=480,
    grad_accum_steps=40,
    optimizer="muon",
    learning_rate=0.025,
    embedding_learning_rate=3.3e-3,
    final_lr_fraction=0.0,
    warmup_steps=100,
    lr_schedule="linear",
    decay_fraction=0.7,
    weight_decay=0.05,
    beta1=0.8,
    momentum_warmup_steps=300,
    split_qkv=True,
    low_precision_stream=True,
    low_precision_logits=True,
    fused_layer_norm=True,
    fused_gelu=True,
    unfused_qkv=True,
    loss_chunks=8,
    vocab_multiple=128,
    eval_every=250,
    eval_tokens=10_485_760,  # modded-nanogpt's
    checkpoint_every=250,
)
PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        block_size=256,
        n_layer=2,
        n_head=4,
        n_embd=128,
        train=TrainConfig(
            max_steps=1100,
            batch_size=8,
            optimizer="muon",
            learning_rate=0.02,
            embedding_learning_rate=0.04,
            final_lr_fraction=0.0,
            warmup_steps=40,
            lr_schedule="linear",
            decay_fraction=0.65,
            weight_decay=0.1,
            beta1=0.6,
            momentum=0.9,
            momentum_warmup_steps=300,
            split_qkv=True,
            eval_every=550,
            checkpoint_every=550,
            sample_every=550,
        ),
    ),
    "small": Preset(
        block_size=512,
        n_layer=6,
        n_head=6,
        n_embd=384,
        train=TrainConfig(
            max_steps=3000,
            batch_size=32,
            optimizer="muon",
            learning_rate=2e-2,
            embedding_learning_rate=6.7e-3,
            final_lr_fraction=0.0,
            warmup_steps=100,
            lr_schedule="linear",
            decay_fraction=0.65,
            weight_decay=0.1,
            beta1=0.8,
            momentum_warmup_steps=300,
            split_qkv=True,
        ),
    ),
    "gpt2": Preset(1024, 12, 12, 768, _LARGE),
    "gpt2-medium": Preset(1024, 24, 16, 1024, dataclasses.replace(_LARGE, embedding_learning_rate=2.5e-3)),
    "gpt2-large": Preset(1024, 36, 20, 1280, dataclasses.replace(_LARGE, embedding_learning_rate=2e-3)),
    "gpt2-xl": Preset(1024, 48, 25, 1600, dataclasses.replace(_LARGE, embedding_learning_rate=1.6e-3)),
}


def find_preset(name: str) -> Preset:
    """Return a preset; UserError names the nearest ones when there is none of that name."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
