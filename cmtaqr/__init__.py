__version__ = "0.1.0"


def __getattr__(name):
    """`detect` and `Detector` on first use, so that importing the package needs torch alone."""
    if name in ("detect", "Detector"):
        from cmtaqr.engine import inference
        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
