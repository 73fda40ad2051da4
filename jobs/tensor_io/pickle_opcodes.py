"""Walks over a pickle before it is loaded, because Python's own loader allocates what a few bytes of it ask for."""

import pickle

NO_ARGUMENT = b"(012NQRabde}l]ost)u\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"
LENGTHS = {
    **dict.fromkeys(NO_ARGUMENT, 1),
    **dict.fromkeys(b"Khq\x80\x82", 2),
    **dict.fromkeys(b"M\x83", 3),
    **dict.fromkeys(b"Jj\x84", 5),
    **dict.fromkeys(b"G\x95", 9),
}
"""Opcode -> its bytes, with an argument of fixed length."""
COUNTED = {**dict.fromkeys(b"UC\x8a\x8c", 1), **dict.fromkeys(b"TBX\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8)}
"""Opcode -> bytes of the number that says how many bytes follow it."""
LINES = {**dict.fromkeys(b"IFLSVgpP", 1), **dict.fromkeys(b"ci", 2)}
"""Opcode -> lines that follow it."""
STEPS = [LENGTHS.get(code, 0) for code in range(256)]
STOP, PUT, LONG_BINPUT = ord("."), ord("p"), ord("r")


def check(data: bytes) -> None:
    """Raise UnpicklingError for a pickle that is cut short, or that would take memory out of proportion to its length.

    The loader's table of objects is as long as the largest number that an object is put under: one opcode of 5 bytes can ask
    for 32 GB. torch numbers them from 0, so no number is larger than the pickle is long. A string that says it is longer
    than the rest of the pickle is refused too: the loader would make room for it before it notices.
    """
    position, size = 0, len(data)
    while position < size:
        code = data[position]
        if step := STEPS[code]:
            position += step
        elif code == STOP:
            return
        elif code == LONG_BINPUT:
            if int.from_bytes(data[position + 1 : position + 5], "little") > size:
                raise pickle.UnpicklingError("an object has a number out of range")
            position += 5
        elif width := COUNTED.get(code, 0):
            position += 1 + width
            position += int.from_bytes(data[position - width : position], "little")
        else:
            position = _after_lines(data, position, code)
    raise pickle.UnpicklingError("pickle data was truncated")


def _after_lines(data: bytes, position: int, code: int) -> int:
    begin = position + 1
    for _ in range(LINES.get(code, 0)):
        position = data.find(b"\n", position + 1)
        if position < 0:
            raise pickle.UnpicklingError("pickle data was truncated")
    if code not in LINES:
        raise pickle.UnpicklingError(f"unknown opcode {code:#04x}")
    if code == PUT and (not data[begin:position].isdigit() or int(data[begin:position][:20]) > len(data)):
        raise pickle.UnpicklingError("an object has a number out of range")
    return position + 1
