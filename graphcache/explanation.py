"""Why a model cannot be captured, in words for its author."""

import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)


def explain(error: BaseException) -> str:
    """What went wrong, the line of the model that did, and what to do about it."""
    place = user_line(error)
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"the model cannot be captured{place}: {reason}. A step must not branch on tensor values; "
        "move that decision out of forward"
    )


def user_line(error: BaseException) -> str:
    """The innermost frame of the user's own code behind an export error."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        frames = [f for f in traceback.extract_tb(chain.__traceback__) if _is_user_code(f.filename)]
        if frames:
            last = frames[-1]
            return f" because of {last.filename}:{last.lineno} in {last.name}: `{last.line}`"
        chain = chain.__cause__ or chain.__context__
    return ""


def _is_user_code(filename: str) -> bool:
    return not filename.startswith((_TORCH, _OWN, "<"))
