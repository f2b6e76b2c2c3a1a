import {
  type Answer,
  type Buffers,
  type Case,
  formatRanges,
  type Piece,
  type PinRequest,
  type Result,
  type Step,
  touched,
} from "../vectors/driver-case.ts";
import { random } from "./random.ts";
import {
  type DriverUnderTest,
  formatUnits,
  hostAnswer,
  parseRequest,
  parseUnits,
} from "./run-driver-case.ts";

const STEPS = 16;
/** Where buffers begin. Few, so that they meet: within a leaf, across two, and at the end of the table. */
const FRAMES = [98, 99, 100, 101, 102, 103, 104, 105, 1022, 1023, 1024, 1025, 0x1_fffe, 0x1_ffff, 0x2_0000];
const LAST = 0x1_ffff;
const WORDS = [
  "",
  "P",
  "A",
  "P A",
  "P 1",
  "A 2",
  "P A 3",
  "P A max-1",
  "A max-1",
  "P max",
  "P W 1",
  "P A D W 2",
];
const DIRECTIONS = ["bidirectional", "to-device", "from-device"] as const;
const FAILURES: readonly Answer[] = ["IOERR", "NOMEM", "FAULT", 0x55, "unwritten", "silence"];
/** As many requests as a list of PIECES buffers can need: two of its three frames, with P between. */
const ANSWERS = 8;
const PIECES = 4;
/** No buffer touches more than 3 frames. */
const LENGTHS = [0, 1, 4096, 4097, 8192];

/** A case of random steps that expects what `driver` does: any other driver can be compared with it. */
export async function randomCase(driver: DriverUnderTest, seed: number): Promise<Case> {
  const below = random(seed);
  const batchMax = 1 + below(3);
  const pinDirty = below(2) === 0;
  await driver.reset(batchMax, [...new Set(FRAMES.flatMap((gfn) => [gfn, gfn + 1, gfn + 2]))], pinDirty);
  const recorder = new Recorder(driver, below);
  const steps: Step[] = [];
  while (steps.length < STEPS) steps.push(await recorder.step());
  return { name: `random case ${seed}`, section: "2 and 3", batchMax, pinDirty, steps };
}

class Recorder {
  readonly #driver: DriverUnderTest;
  readonly #below: (below: number) => number;
  readonly #mapped: Buffers[] = [];
  /** What a request that was not answered had asked for. */
  #lost: number[] | undefined;
  #on = true;

  constructor(driver: DriverUnderTest, below: (below: number) => number) {
    this.#driver = driver;
    this.#below = below;
  }

  async step(): Promise<Step> {
    if (this.#lost && this.#below(4) === 0) return await this.#late(this.#lost);
    if (!this.#on && this.#below(2) === 0) return await this.#device(true);
    const what = this.#below(20);
    if (what === 0) return await this.#device(false);
    if (what < 3) return await this.#set();
    if (what < 8) return await this.#unmap();
    return await this.#map();
  }

  async #map(): Promise<Step> {
    const map = this.#buffers();
    const answers = Array.from({ length: ANSWERS }, () => this.#answer(map));
    const { result, requests } = await this.#driver.map(map, answers.map(hostAnswer));
    const asks = requests.map(({ bytes, units }, i) => ({
      ...answers[i]!,
      ranges: formatRanges(parseRequest(bytes).ranges),
      units: formatUnits(units),
    }));
    if (result === "mapped") this.#mapped.push(map);
    if (result === "lost") this.#lost = withUnit(map);
    return { map, asks, result: result as Result, units: formatUnits(await this.#driver.units()) };
  }

  async #unmap(): Promise<Step> {
    const [old] = this.#mapped.splice(this.#below(this.#mapped.length || 1), 1);
    const unmap = old ?? this.#buffers();
    const { counted } = await this.#driver.unmap(unmap);
    return { unmap, counted, units: formatUnits(await this.#driver.units()) };
  }

  async #set(): Promise<Step> {
    const gfn = this.#pick(FRAMES.filter((f) => f <= LAST));
    const set = `${gfn}: ${this.#pick(WORDS)}`;
    for (const [frame, word] of parseUnits(set)) await this.#driver.setUnit(frame, word);
    return { set };
  }

  async #late(frames: number[]): Promise<Step> {
    const late = this.#some(frames);
    this.#lost = undefined;
    await this.#driver.late(late);
    return { late };
  }

  async #device(on: boolean): Promise<Step> {
    this.#on = on;
    await this.#driver.device(on);
    return { device: on ? "on" : "off" };
  }

  #buffers(): Buffers {
    const piece = (): Piece => [this.#pick(FRAMES), this.#pick([0, 0, 1, 4095]), this.#pick(LENGTHS)];
    const direction = this.#pick(DIRECTIONS);
    if (this.#below(2)) return { kind: "single", direction, pieces: [piece()] };
    return { kind: "sg", direction, pieces: Array.from({ length: 1 + this.#below(PIECES) }, piece) };
  }

  /** Mostly what a host must do; it may also pin too little or too much. */
  #answer(map: Buffers): Pick<PinRequest, "pins" | "answer"> {
    const frames = withUnit(map);
    if (this.#below(8) === 0) return { pins: this.#some(frames), answer: this.#pick(FAILURES) };
    return { pins: this.#below(8) ? frames : this.#some(frames), answer: "OK" };
  }

  #some = (frames: readonly number[]): number[] => frames.filter(() => this.#below(2));
  #pick = <T>(of: readonly T[]): T => of[this.#below(of.length)]!;
}

const withUnit = (buffers: Buffers): number[] => [...new Set(touched(buffers))].filter((gfn) => gfn <= LAST);
