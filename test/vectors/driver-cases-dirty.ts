/** Which units say that a device may write a frame, or has. Beside driver-cases.ts, for the same two drivers. */
import {
  ask,
  type Case,
  fails,
  frames,
  fromDevice,
  list,
  map,
  set,
  sg,
  toDevice,
  unmap,
} from "./driver-case.ts";

const COUNT = "1: COUNT";
const MAP = "2: guest map";
const UNMAP = "2: guest unmap";

const read = toDevice(frames(100));
const written = fromDevice(frames(100));

const CASES_WITH_PIN_DIRTY: readonly Case[] = [
  {
    name: "W as long as the device may write, D from then on",
    section: UNMAP,
    steps: [set("100: P"), map(written, "100: P A W 1"), unmap(written, "100: P A D")],
  },
  {
    name: "a buffer in both directions may be written",
    section: MAP,
    steps: [set("100: P"), map(frames(100), "100: P A W 1"), unmap(frames(100), "100: P A D")],
  },
  {
    name: "a buffer that the device only reads has neither W nor D",
    section: MAP,
    steps: [
      set("100: P, 200: P"),
      map(read, "100: P A 1, 200: P"),
      unmap(read, "100: P A, 200: P"),
      map(toDevice(list(100, 200)), "100: P A 1, 200: P A 1"),
      unmap(toDevice(list(100, 200)), "100: P A, 200: P A"),
    ],
  },
  {
    name: "D comes with the unmap of a writable buffer, and W goes with the last one of any",
    section: UNMAP,
    steps: [
      set("100: P"),
      map(read, "100: P A 1"),
      map(written, "100: P A W 2"),
      unmap(written, "100: P A D W 1"),
      unmap(read, "100: P A D"),
    ],
  },
  {
    name: "the unmap of a buffer that the device only reads sets no D, though the frame has W",
    section: UNMAP,
    steps: [
      set("100: P"),
      map(written, "100: P A W 1"),
      map(read, "100: P A W 2"),
      unmap(read, "100: P A W 1"),
      unmap(written, "100: P A D"),
    ],
  },
  {
    name: "D is set again after a harvest has cleared it",
    section: UNMAP,
    steps: [
      set("100: P A D W 2"),
      unmap(written, "100: P A D W 1"),
      set("100: P A W 1"),
      unmap(written, "100: P A D"),
      set("100: P"),
      map(written, "100: P A W 1"),
    ],
  },
  {
    name: "W is set before the frame is asked for",
    section: MAP,
    steps: [map(written, "100: P A W 1", ask("100", "100: A W 1")), unmap(written, "100: P A D")],
  },
  {
    name: "a list has W in all frames that its entries touch",
    section: MAP,
    steps: [
      map(
        fromDevice(sg([1023, 4000, 200], [200, 0, 8], [200, 8, 8])),
        "200: P A W 2, 1023: P A W 1, 1024: P A W 1",
        ask("1023+2, 200", "200: A W 2, 1023: A W 1, 1024: A W 1"),
      ),
      unmap(
        fromDevice(sg([1023, 4000, 200], [200, 0, 8], [200, 8, 8])),
        "200: P A D, 1023: P A D, 1024: P A D",
      ),
    ],
  },
  {
    name: "a buffer that is refused leaves neither W nor D: no device was told",
    section: UNMAP,
    steps: [
      fails("refused NOMEM", written, "100: A", ask("100", "100: A W 1", "NOMEM")),
      fails("not-seen", written, "100: A", ask("100", "100: A W 1", "OK", [])),
    ],
  },
  {
    name: "a list that is refused leaves neither W nor D",
    section: UNMAP,
    steps: [
      fails(
        "refused IOERR",
        fromDevice(list(100, 105)),
        "100: A, 105: A",
        ask("100, 105", "100: A W 1, 105: A W 1", "IOERR"),
      ),
    ],
  },
  {
    name: "a list that cannot be counted leaves neither W nor D",
    section: COUNT,
    steps: [
      set("100: P, 101: P A W max"),
      fails("saturated", fromDevice(frames(100, 2)), "100: P A, 101: P A W max"),
      fails("saturated", fromDevice(list(100, 101)), "100: P A, 101: P A W max"),
      fails("no-unit", fromDevice(list(100, 2 ** 19)), "100: P A, 101: P A W max"),
    ],
  },
  {
    name: "a refusal leaves the W of another mapping",
    section: UNMAP,
    steps: [
      set("100: A W 1"),
      fails("refused IOERR", written, "100: A W 1", ask("100", "100: A W 2", "IOERR")),
      fails("refused IOERR", read, "100: A W 1", ask("100", "100: A W 2", "IOERR")),
    ],
  },
  {
    name: "an unmap of COUNT 0 sets no D",
    section: UNMAP,
    steps: [set("100: P A"), unmap(written, "100: P A", 0)],
  },
];

export const DIRTY_CASES: readonly Case[] = [
  {
    name: "without PIN_DIRTY, a buffer that the device writes has neither W nor D",
    section: MAP,
    steps: [set("100: P"), map(written, "100: P A 1"), unmap(written, "100: P A")],
  },
  {
    name: "without PIN_DIRTY, W that an earlier device wanted goes with the last mapping",
    section: UNMAP,
    steps: [set("100: P A W 2"), unmap(read, "100: P A W 1"), unmap(written, "100: P A D")],
  },
  ...CASES_WITH_PIN_DIRTY.map((tested) => ({ ...tested, pinDirty: true })),
];
