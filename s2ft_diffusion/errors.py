"""How a run can end early; each of these is one line on the screen and an exit code."""


class InputError(ValueError):
    """Something the user gave that cannot work; its message is the one line the user sees."""


class Diverged(RuntimeError):
    """The loss, or a gradient, is not finite any more."""


class NotPublished(RuntimeError):
    """The upload failed; the adapter is on disk."""


class NotWritten(RuntimeError):
    """A checkpoint could not be written, on a full disk for example; those before it are complete."""


class Interrupted(RuntimeError):
    """Ctrl-C, after a checkpoint was written."""
