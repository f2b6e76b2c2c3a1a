import { FRAME_SIZE } from "../../src/base/units.ts";
import { PIPE_ENDPOINT } from "../../src/transport/pipe.ts";
import { PIPE_OPCODES, PIPE_RECORDS, type PipeOpcode, PipeRange, pipeTail } from "../../src/wire/pipe.ts";
import { type Fields, putUint, type Struct } from "../../src/wire/struct.ts";
import { PinRange, ReqPin, VIRTIO_IOMMU_T_PIN } from "../../src/wire/virtio-iommu.ts";
import { BLOCK_FRAMES, BLOCKS, type DeviceParts, fuzzDevice } from "./device.ts";
import type { Next, Target } from "./fuzzer.ts";
import { crosvmTarget, mpqemuTarget } from "./mpqemu.ts";
import { vhostUserTarget } from "./vhost-user.ts";

/** What operands mostly are; anything else now and then. */
const OPERANDS: Record<string, (next: Next) => number> = {
  gfn: (next) => BLOCKS[next(BLOCKS.length)]! + next(BLOCK_FRAMES),
  gpa: (next) => FRAME_SIZE * next(48) + 4 * next(8),
  levels: () => 0,
  flags: (next) => next(2),
  without: () => 0,
  endpoint: () => 0,
  nrFrames: (next) => (next(2) ? 1 : 1 + next(BLOCK_FRAMES)),
  count: (next) => 1 + next(3),
  index: (next) => next(4),
  next: (next) => next(4),
  head: (next) => next(4),
  addr: (next) => FRAME_SIZE * next(48),
};
const anything = (next: Next): number =>
  [next(4), next(4), 32 * next(8), next(256), 255, next(2 ** 16)][next(6)]!;

function record(next: Next, opcode: PipeOpcode = PIPE_OPCODES[next(PIPE_OPCODES.length)]!): Uint8Array {
  const layout: Struct<Fields> = PIPE_RECORDS[opcode];
  const operands = new Uint8Array(layout.size);
  const fill = (fields: Fields, bytes: Uint8Array, base: number) => {
    for (const [name, { at, size }] of Object.entries(fields)) {
      const usual = next(8) > 0 ? OPERANDS[name] : undefined;
      putUint(bytes, base + at, size, BigInt((usual ?? anything)(next)));
    }
  };
  fill(layout.fields, operands, 0);
  const tail = new Uint8Array(pipeTail(opcode, layout.read(operands)));
  if (opcode === "pin")
    for (let at = 0; at < tail.length; at += PipeRange.size) fill(PipeRange.fields, tail, at);
  else tail.set(tail.map(() => anything(next)));
  return Uint8Array.of(PIPE_OPCODES.indexOf(opcode), ...operands, ...tail);
}

/** A PIN request that is wrong in a place or two, as bytes. */
function almostPin(next: Next): Uint8Array {
  const ranges = next(4);
  const head = { type: VIRTIO_IOMMU_T_PIN, endpoint: PIPE_ENDPOINT, nrRanges: ranges };
  const whole = ReqPin.encode(head, PinRange.size * ranges);
  for (let i = 0; i < ranges; i++) {
    const range = { gfn: OPERANDS.gfn!(next), nrFrames: 1 };
    PinRange.write(whole, range, ReqPin.size + i * PinRange.size);
  }
  if (next(2)) whole[next(whole.length)] = anything(next);
  const request = next(2) ? whole.subarray(0, next(whole.length + 1)) : whole;
  return Uint8Array.of(PIPE_OPCODES.indexOf("send"), 0, 4, next(2) * next(20), request.length, ...request);
}

/** Records of a guest in its right mind. The others mostly end in a ring or a table that is no longer one. */
const SOUND: readonly PipeOpcode[] = [
  "map",
  "unmap",
  "pin",
  "pass",
  "memoryMap",
  "hostPins",
  "hostReleases",
  "touch",
];

function piece(next: Next): Uint8Array {
  const kind = next(8);
  if (kind === 0) return Uint8Array.of(...record(next, "start"), ...record(next, "pinOn"));
  if (kind === 1) return almostPin(next);
  return kind < 6 ? record(next, SOUND[next(SOUND.length)]) : record(next);
}

/** Where records begin, and where the last one ends. The first byte is the device's options. */
function boundaries(input: Uint8Array): number[] {
  const found: number[] = [];
  for (let at = 1; at < input.length; ) {
    found.push(at);
    const opcode = PIPE_OPCODES[input[at]! % PIPE_OPCODES.length]!;
    const layout: Struct<Fields> = PIPE_RECORDS[opcode];
    at += 1 + layout.size;
    if (at > input.length) return found;
    at += pipeTail(opcode, layout.read(input, at - layout.size));
  }
  return [...found, input.length];
}

export const deviceTarget = (parts: DeviceParts = {}): Target => ({
  name: "device",
  run: (input) => fuzzDevice(input, parts),
  piece,
  boundaries,
  explain(input) {
    const lines: string[] = [];
    try {
      fuzzDevice(input, parts, ({ opcode, operands, sent, answers }) => {
        const numbers = Object.entries(operands).map(([name, value]) => ` ${name}=0x${value.toString(16)}`);
        const queue = [
          sent.length ? ` sent ${sent}` : "",
          ...answers.map((a) => ` answered ${a.head}:${a.written}`),
        ];
        lines.push(opcode + numbers.join("") + queue.join(""));
      });
    } catch {
      lines.push("(what comes next fails)");
    }
    return lines;
  },
});

export const targets: readonly Target[] = [deviceTarget(), mpqemuTarget(), crosvmTarget(), vhostUserTarget()];
