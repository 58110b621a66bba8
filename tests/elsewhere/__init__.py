"""Models that others wrote, by package: each a line of a table that says what builds it and how many steps it has."""

from tests.elsewhere import convolutions, diffusion, language, medical, restoration, series, sound, vdcnn, vision
from tests.elsewhere.case import Case

PACKAGES: dict[str, list[Case]] = {
    package: cases
    for table in (vision, convolutions, medical, restoration, diffusion, language, sound, series, vdcnn)
    for package, cases in table.PACKAGES.items()
}

# Packages that the extra `elsewhere` leaves out, and why; their models are skipped where they are not installed.
LEFT_OUT = {"litgpt": "it wants huggingface-hub<1.4, and transformers 5 a later one"}
