/**
 * What a guest driver does to the tracking units, and what it asks the host for, case by case. The driver in TypeScript
 * and the kernel module must both pass all of it.
 */
import {
  ask,
  type Case,
  device,
  fails,
  frames,
  late,
  list,
  map,
  set,
  sg,
  single,
  unmap,
} from "./driver-case.ts";
import { DIRTY_CASES } from "./driver-cases-dirty.ts";

/** The guest that the frames below are chosen for: its table has two levels. */
export const MACHINE = { memoryMiB: 512, cpus: 2 } as const;
/** The last frame with a unit. There is no leaf for the next one; of OUTSIDE the levels know nothing. */
const LAST = 0x1_ffff;
const OUTSIDE = 2 ** 19;

const COUNT = "1: COUNT";
const MAP = "2: guest map";
const UNMAP = "2: guest unmap";
const PIN = "3: PIN request";

export const CASES: readonly Case[] = [
  {
    name: "a pinned frame is mapped without a request, and nothing but COUNT changes",
    section: MAP,
    steps: [set("100: P A D W 2"), map(frames(100), "100: P A D W 3"), unmap(frames(100), "100: P A D W 2")],
  },
  {
    name: "A is set again after the host has cleared it",
    section: MAP,
    steps: [set("100: P"), map(frames(100), "100: P A 1"), set("100: P 1"), map(frames(100), "100: P A 2")],
  },
  {
    name: "a frame is counted and marked before it is asked for",
    section: MAP,
    steps: [map(frames(100), "100: P A 1", ask("100", "100: A 1")), map(frames(100), "100: P A 2")],
  },
  {
    name: "P that the host has cleared between two maps is asked for again",
    section: MAP,
    steps: [
      set("100: P A"),
      map(frames(100), "100: P A 1"),
      unmap(frames(100), "100: P A"),
      set("100:"),
      map(frames(100), "100: P A 1", ask("100", "100: A 1")),
    ],
  },
  {
    name: "a frame that is mapped but not pinned is asked for",
    section: MAP,
    steps: [set("100: A 1"), map(frames(100), "100: P A 2", ask("100", "100: A 2"))],
  },
  {
    name: "a buffer counts every frame that it touches, and no other",
    section: MAP,
    steps: [
      set("99: P, 100: P, 101: P, 102: P, 103: P"),
      map(frames(100), "99: P, 100: P A 1, 101: P, 102: P, 103: P"),
      map(single(100, 1, 4096), "99: P, 100: P A 2, 101: P A 1, 102: P, 103: P"),
      map(single(100, 4095, 1), "99: P, 100: P A 3, 101: P A 1, 102: P, 103: P"),
      map(single(100, 4095, 2), "99: P, 100: P A 4, 101: P A 2, 102: P, 103: P"),
      map(single(100, 4095, 4098), "99: P, 100: P A 5, 101: P A 3, 102: P A 1, 103: P"),
      unmap(single(100, 4095, 4098), "99: P, 100: P A 4, 101: P A 2, 102: P A, 103: P"),
      unmap(single(100, 1, 4096), "99: P, 100: P A 3, 101: P A 1, 102: P A, 103: P"),
    ],
  },
  {
    name: "a buffer across two leaves of the table",
    section: MAP,
    steps: [
      map(frames(1023, 2), "1023: P A 1, 1024: P A 1", ask("1023+2", "1023: A 1, 1024: A 1")),
      unmap(frames(1023, 2), "1023: P A, 1024: P A"),
    ],
  },
  {
    name: "a buffer of length 0 counts its frame within one, and none at its start",
    section: MAP,
    steps: [
      set("100: P"),
      map(single(100, 0, 0), "100: P"),
      map(single(100, 8, 0), "100: P A 1"),
      unmap(single(100, 0, 0), "100: P A 1"),
      unmap(single(100, 8, 0), "100: P A"),
    ],
  },
  {
    name: "frames with P are left out of the request",
    section: PIN,
    steps: [
      set("101: P A 1"),
      map(
        frames(100, 4),
        "100: P A 1, 101: P A 2, 102: P A 1, 103: P A 1",
        ask("100, 102+2", "100: A 1, 101: P A 2, 102: A 1, 103: A 1"),
      ),
    ],
  },
  {
    name: "a list whose frames are all pinned is mapped without a request",
    section: MAP,
    steps: [
      set("100: P, 200: P A 1"),
      map(list(200, 100), "100: P A 1, 200: P A 2"),
      unmap(list(200, 100), "100: P A, 200: P A 1"),
    ],
  },
  {
    name: "a list counts all its frames before it asks once for those without P",
    section: MAP,
    steps: [
      set("200: P"),
      map(
        sg([100, 4000, 200], [200, 0, 8], [300, 0, 4096]),
        "100: P A 1, 101: P A 1, 200: P A 1, 300: P A 1",
        ask("100+2, 300", "100: A 1, 101: A 1, 200: P A 1, 300: A 1"),
      ),
    ],
  },
  {
    name: "neighbours in a list become one range, which counts once against the limit",
    section: PIN,
    batchMax: 2,
    steps: [
      map(
        list(100, 102, 103, 104),
        "100: P A 1, 102: P A 1, 103: P A 1, 104: P A 1",
        ask("100, 102+3", "100: A 1, 102: A 1, 103: A 1, 104: A 1"),
      ),
    ],
  },
  {
    name: "ranges are asked for in the order of the list",
    section: PIN,
    steps: [map(list(101, 100), "100: P A 1, 101: P A 1", ask("101, 100", "100: A 1, 101: A 1"))],
  },
  {
    name: "entries that share a frame count it twice and ask for it once",
    section: COUNT,
    steps: [
      map(
        sg([100, 0, 100], [100, 200, 4096], [101, 3000, 8]),
        "100: P A 2, 101: P A 2",
        ask("100+2", "100: A 2, 101: A 2"),
      ),
      unmap(sg([100, 0, 100], [100, 200, 4096], [101, 3000, 8]), "100: P A, 101: P A"),
    ],
  },
  {
    name: "a frame that comes back later in a list is asked for again",
    section: PIN,
    steps: [map(list(100, 105, 100), "100: P A 2, 105: P A 1", ask("100, 105, 100", "100: A 2, 105: A 1"))],
  },
  {
    name: "more ranges than pin_batch_max are asked for in several requests",
    section: "3: pin_batch_max",
    batchMax: 2,
    steps: [
      map(
        list(100, 102, 104),
        "100: P A 1, 102: P A 1, 104: P A 1",
        ask("100, 102", "100: A 1, 102: A 1, 104: A 1"),
        ask("104", "100: P A 1, 102: P A 1, 104: A 1"),
      ),
    ],
  },
  {
    name: "a second request that is refused rolls the whole list back",
    section: PIN,
    batchMax: 1,
    steps: [
      set("104: P A 1"),
      fails(
        "refused NOMEM",
        list(100, 102, 104),
        "100: P A, 102: A, 104: P A 1",
        ask("100", "100: A 1, 102: A 1, 104: P A 2"),
        ask("102", "100: P A 1, 102: A 1, 104: P A 2", "NOMEM"),
      ),
    ],
  },
  {
    name: "nothing is asked for after a request that failed",
    section: PIN,
    batchMax: 1,
    steps: [
      fails("refused IOERR", list(100, 102), "100: A, 102: A", ask("100", "100: A 1, 102: A 1", "IOERR")),
      fails("not-seen", list(100, 102), "100: A, 102: A", ask("100", "100: A 1, 102: A 1", "OK", [])),
      fails("lost", list(100, 102), "100: A, 102: A", ask("100", "100: A 1, 102: A 1", "silence")),
    ],
  },
  {
    name: "an answer that does not come in the middle of a list rolls it back",
    section: PIN,
    batchMax: 1,
    steps: [
      fails(
        "lost",
        list(100, 102),
        "100: P A, 102: A",
        ask("100", "100: A 1, 102: A 1"),
        ask("102", "100: P A 1, 102: A 1", "silence"),
      ),
    ],
  },
  {
    name: "frames that have got P meanwhile are left out of the next request",
    section: PIN,
    batchMax: 1,
    steps: [
      map(
        list(100, 102, 104),
        "100: P A 1, 102: P A 1, 104: P A 1",
        ask("100", "100: A 1, 102: A 1, 104: A 1", "OK", [100, 104]),
        ask("102", "100: P A 1, 102: A 1, 104: P A 1"),
      ),
    ],
  },
  {
    name: "a frame that comes back after its request was answered is not asked for again",
    section: PIN,
    batchMax: 1,
    steps: [
      map(
        list(100, 105, 100),
        "100: P A 2, 105: P A 1",
        ask("100", "100: A 2, 105: A 1"),
        ask("105", "100: P A 2, 105: A 1"),
      ),
    ],
  },
  {
    name: "COUNT reaches its highest value, and the next map is refused",
    section: COUNT,
    steps: [
      set("100: P max-1"),
      map(frames(100), "100: P A max"),
      fails("saturated", frames(100), "100: P A max"),
      unmap(frames(100), "100: P A max-1"),
      map(frames(100), "100: P A max"),
    ],
  },
  {
    name: "a full COUNT in the middle of a buffer: rolled back, nothing asked",
    section: COUNT,
    steps: [set("101: P max"), fails("saturated", frames(100, 3), "100: A, 101: P max")],
  },
  {
    name: "a full COUNT in the middle of a list: rolled back, nothing asked",
    section: COUNT,
    steps: [
      set("101: P A 1, 102: P A max, 104: P"),
      fails(
        "saturated",
        sg([100, 0, 8192], [102, 0, 1], [104, 0, 1]),
        "100: A, 101: P A 1, 102: P A max, 104: P",
      ),
    ],
  },
  {
    name: "a frame that fills its COUNT with the first entry and is refused with the second",
    section: COUNT,
    steps: [set("100: P A max-1"), fails("saturated", list(100, 100), "100: P A max-1")],
  },
  {
    name: "a frame without a leaf, and one that the table's levels cannot reach",
    section: "1",
    steps: [
      fails("no-unit", frames(LAST + 1), ""),
      fails("no-unit", frames(OUTSIDE), ""),
      fails("no-unit", sg([OUTSIDE, 0, 1]), ""),
    ],
  },
  {
    name: "a buffer that leaves the table: rolled back, nothing asked",
    section: "1",
    steps: [
      fails("no-unit", frames(LAST, 2), `${LAST}: A`),
      fails("no-unit", frames(OUTSIDE - 1, 2), `${LAST}: A`),
    ],
  },
  {
    name: "a list with a frame outside the table in the middle: rolled back, nothing asked",
    section: "1",
    steps: [set("101: P A 5"), fails("no-unit", list(100, 101, LAST + 1, 102), "100: A, 101: P A 5")],
  },
  ...(["IOERR", "UNSUPP", "DEVERR", "INVAL", "RANGE", "NOENT", "FAULT", "NOMEM"] as const).map(
    (status): Case => ({
      name: `${status}: rolled back, and the next map asks again`,
      section: PIN,
      steps: [
        set("101: P A 1"),
        fails(
          `refused ${status}`,
          frames(100, 2),
          "100: A, 101: P A 1",
          ask("100", "100: A 1, 101: P A 2", status),
        ),
        map(frames(100), "100: P A 1, 101: P A 1", ask("100", "100: A 1, 101: P A 1")),
      ],
    }),
  ),
  ...[9, 0x80, 0xff].map(
    (status): Case => ({
      name: `${status}, which is no status: rolled back`,
      section: PIN,
      steps: [fails("refused unknown", frames(100), "100: A", ask("100", "100: A 1", status))],
    }),
  ),
  {
    name: "a request that the device does not know is refused as UNSUPP",
    section: "3: UNSUPP",
    steps: [fails("refused UNSUPP", frames(100), "100: A", ask("100", "100: A 1", "unwritten"))],
  },
  {
    name: "a refusal counts also when P was set",
    section: PIN,
    steps: [fails("refused IOERR", frames(100), "100: P A", ask("100", "100: A 1", "IOERR", [100]))],
  },
  {
    name: "OK without P is not believed",
    section: MAP,
    steps: [fails("not-seen", frames(100), "100: A", ask("100", "100: A 1", "OK", []))],
  },
  {
    name: "OK with P in all frames but the last of a list is not believed",
    section: MAP,
    steps: [
      fails(
        "not-seen",
        list(100, 101, 105, 106),
        "100: P A, 101: P A, 105: P A, 106: A",
        ask("100+2, 105+2", "100: A 1, 101: A 1, 105: A 1, 106: A 1", "OK", [100, 101, 105]),
      ),
    ],
  },
  {
    name: "without an answer, pinned frames are mapped and unmapped, and nothing is asked",
    section: MAP,
    steps: [
      set("200: P"),
      fails("lost", frames(100), "100: A, 200: P", ask("100", "100: A 1, 200: P", "silence")),
      fails("off", frames(100), "100: A, 200: P"),
      fails("off", list(200, 100), "100: A, 200: P A"),
      map(frames(200), "100: A, 200: P A 1"),
      unmap(frames(200), "100: A, 200: P A"),
    ],
  },
  {
    name: "P that was set without an answer is believed by the next map",
    section: MAP,
    steps: [
      fails("lost", frames(100), "100: P A", ask("100", "100: A 1", "silence", [100])),
      map(frames(100), "100: P A 1"),
    ],
  },
  {
    name: "after a late answer, requests are made again",
    section: PIN,
    steps: [
      fails("lost", frames(100), "100: A", ask("100", "100: A 1", "silence")),
      fails("off", frames(101), "100: A, 101: A"),
      late(100),
      map(frames(100), "100: P A 1, 101: A"),
      map(frames(101), "100: P A 1, 101: P A 1", ask("101", "100: P A 1, 101: A 1")),
    ],
  },
  {
    name: "an answer that is lost again after the first came late",
    section: PIN,
    steps: [
      fails("lost", frames(100), "100: A", ask("100", "100: A 1", "silence")),
      late(),
      fails("lost", frames(100), "100: A", ask("100", "100: A 1", "silence")),
      fails("off", frames(100), "100: A"),
      late(),
      map(frames(100), "100: P A 1", ask("100", "100: A 1")),
    ],
  },
  {
    name: "with PIN off, what would be asked for is refused, and pinned frames are mapped",
    section: "3: pin_control",
    steps: [
      set("200: P"),
      device("off"),
      fails("off", frames(100), "100: A, 200: P"),
      fails("off", list(200, 100), "100: A, 200: P A"),
      map(frames(200), "100: A, 200: P A 1"),
      unmap(frames(200), "100: A, 200: P A"),
      device("on"),
      map(frames(100), "100: P A 1, 200: P A", ask("100", "100: A 1, 200: P A")),
    ],
  },
  {
    name: "an unmap asks for nothing, whether P is set or not",
    section: UNMAP,
    steps: [
      set("100: A 2, 101: P 1"),
      unmap(frames(100, 2), "100: A 1, 101: P"),
      unmap(list(100), "100: A, 101: P"),
    ],
  },
  {
    name: "an unmap of COUNT 0 is refused, and borrows from no flag",
    section: UNMAP,
    steps: [set("100: P A D"), unmap(frames(100), "100: P A D", 0), unmap(frames(101), "100: P A D", 0)],
  },
  {
    name: "an unmap goes on behind a frame with COUNT 0",
    section: UNMAP,
    steps: [
      set("100: P A 1, 101: P A, 102: P A 2"),
      unmap(frames(100, 3), "100: P A, 101: P A, 102: P A 1", 2),
      unmap(list(100, 101, 102), "100: P A, 101: P A, 102: P A", 1),
    ],
  },
  {
    name: "an unmap of frames without a unit is refused",
    section: UNMAP,
    steps: [
      set(`${LAST}: P A 1`),
      unmap(frames(LAST, 2), `${LAST}: P A`, 1),
      unmap(list(OUTSIDE), `${LAST}: P A`, 0),
    ],
  },
  {
    name: "a list unmaps a frame that it names twice two times",
    section: UNMAP,
    steps: [set("100: P A 3"), unmap(list(100, 100), "100: P A 1"), unmap(list(100, 100), "100: P A", 1)],
  },
  ...DIRTY_CASES,
];
