"""`jaxgpt sample`: text from a trained run, computed by JAX.

jaxgpt sample --run RUN --prompt "Return the mean of a list."
"""

import dataclasses
from pathlib import Path

from jaxgpt.generation.generate import PromptOptions, generate_shown
from jaxgpt.shared.console import Result, say
from jaxgpt.training.run.folder import open_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(PromptOptions):
    """Continue a prompt with a trained run.

    Attributes:
      run: the run folder.
      step: best, latest, or a stored step.
    """

    run: Path
    step: str = "best"


def sample(options: SampleOptions) -> Result:
    """Run `jaxgpt sample`: the text streams to stdout."""
    from jaxgpt.training.devices.compilation_cache import compilation_cache
    from jaxgpt.training.flax_session import FlaxSession
    from jaxgpt.training.run.checkpoints import load_params

    sampling = options.sampling({})  # a bad value is said before anything is loaded
    prompt = options.prompt_text()
    run = open_run(options.run)
    with compilation_cache():
        step, params = load_params(run, options.step)
        session = FlaxSession(run.config.model, params)
        done = generate_shown(session, run.tokenizer, options, prompt, sampling)
    say(f"step {step}: {len(done.tokens)} tokens ({done.finish_reason})")
    return Result({"step": step, **dataclasses.asdict(done)})
