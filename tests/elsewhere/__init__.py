"""Models that others wrote, by package: each a line of a table that says what builds it and how many steps it has."""

from tests.elsewhere import convolutions, diffusion, language, medical, restoration, series, sound, vision
from tests.elsewhere.case import Case

PACKAGES: dict[str, list[Case]] = {
    package: cases
    for table in (vision, convolutions, medical, restoration, diffusion, language, sound, series)
    for package, cases in table.PACKAGES.items()
}
