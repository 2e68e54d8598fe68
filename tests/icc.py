"""Small ICC profiles, made by the specification (ICC.1:2001-04), as no file of theirs comes with Python."""

import struct


def profile(space: bytes, device: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2.4 with these tags; space, class and connection space by their four letters."""
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    size = offset + len(data)
    head = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02400000, device, space, connection, bytes(12), b"acsp")
    head = head.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)  # D50
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def xyz(*values: float) -> bytes:
    """An XYZ tag."""
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(value * 65536) for value in values))


def curve(gamma: float | None) -> bytes:
    """A curve tag: a gamma, or sRGB's own curve."""
    if gamma:
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    steps = [step / 1023 for step in range(1024)]
    light = [step / 12.92 if step <= 0.04045 else ((step + 0.055) / 1.055) ** 2.4 for step in steps]
    return b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *(round(value * 65535) for value in light))


def rgb(red: tuple, green: tuple, blue: tuple, gamma: float | None) -> bytes:
    """A display's profile of three primaries in XYZ, relative to D50."""
    primaries = {b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue), b"wtpt": xyz(0.9642, 1, 0.8249)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    return profile(b"RGB ", b"mntr", b"XYZ ", {**primaries, **curves})


def grey(gamma: float) -> bytes:
    """A profile of greys."""
    return profile(b"GRAY", b"mntr", b"XYZ ", {b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": curve(gamma)})


def cmyk(lab: tuple[int, int, int]) -> bytes:
    """A printer's profile in which full cyan alone has this colour (Lab in bytes), and every other corner is grey."""
    corners = [(cyan, rest) for cyan in (0, 1) for rest in range(8)]
    table = b"".join(bytes(lab) if (cyan, rest) == (1, 0) else bytes((128, 128, 128)) for cyan, rest in corners)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (index % 4 == 0) for index in range(9)))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + ramp * 4 + table + ramp * 3
    return profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"wtpt": xyz(0.9642, 1, 0.8249)})


DISPLAY_P3 = rgb((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), None)
ADOBE_RGB = rgb((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.19921875)
