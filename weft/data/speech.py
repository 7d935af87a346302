"""Spoken digits: by espeak-ng where it is installed, otherwise pairs of tones that stand for them."""

import shutil
import subprocess
import wave
from itertools import product
from pathlib import Path

import numpy as np

from weft.config.errors import DataError

VARIANTS = 10
"""Ways in which each digit is spoken."""
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PROGRAM = "espeak-ng"
_RATE = 16000
_SECONDS = 0.3
_PATIENCE = 60  # seconds that a word may take


def speaker() -> str:
    """The program that speaks, or nothing."""
    return shutil.which(_PROGRAM) or ""


def write_speech(folder: Path) -> str:
    """Write ``DIGIT-VARIANT.wav`` for all; gives a line that says who speaks.

    Raises:
        DataError: the program fails.
    """
    program = speaker()
    for digit, variant in product(range(10), range(VARIANTS)):
        path = folder / f"{digit}-{variant}.wav"
        if program:
            _speak(program, path, digit, variant)
        else:
            _tones(path, digit, variant)
    if program:
        return f"digits are spoken by {_PROGRAM}"
    return f"{_PROGRAM} is not installed: a pair of tones stands for each digit instead of speech"


def _speak(program: str, path: Path, digit: int, variant: int) -> None:
    """One word; variants differ in pitch (0 to 99) and speed (words per minute)."""
    pitch, speed = 30 + variant * 37 % 41, 140 + variant * 29 % 61
    order = [program, "-v", "en", "-p", str(pitch), "-s", str(speed), "-w", str(path), _WORDS[digit]]
    try:
        subprocess.run(order, check=True, capture_output=True, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        raise DataError(f"{program}: cannot speak ({error}); mend it, or uninstall it for tones") from error


def _tones(path: Path, digit: int, variant: int) -> None:
    """Two tones at once, of frequencies that no other digit has both of; variants differ by up to 3%."""
    time = np.arange(int(_SECONDS * _RATE)) / _RATE
    bend = 1 + 0.06 * (variant / (VARIANTS - 1) - 0.5)
    sound = sum(
        np.sin(2 * np.pi * hertz * bend * time)
        for hertz in (350 + 90 * (digit // 4), 1200 + 190 * (digit % 4))
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((np.asarray(sound) * 8000).astype("<i2").tobytes())
