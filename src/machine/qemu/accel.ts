import { accessSync, constants, writeFileSync } from "node:fs";
import { join } from "node:path";
import { cached, digest } from "./cache.ts";
import { command } from "./command.ts";

export type Accel = "tcg" | "kvm";

export interface AccelChoice {
  accel: Accel;
  /** Why, in a few words. */
  reason: string;
}

const FIRMWARE_SIZE = 0x1_0000;
const RESET_VECTOR = 0xfff0;
const EXIT_PORT = 0x501;
const EXIT_VALUE = 0x10;
/** isa-debug-exit ends QEMU with (value << 1) | 1. */
const EXIT_CODE = (EXIT_VALUE << 1) | 1;

/**
 * /dev/kvm that opens is not yet one that runs a guest (nested, or half emulated by a sandbox). So a firmware of
 * three instructions is run with the host's CPU model, as a guest would be: 0.1 s, and it must end QEMU by itself.
 */
export async function probeKvm(qemu: string): Promise<AccelChoice> {
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
  } catch (error) {
    const absent = (error as NodeJS.ErrnoException).code === "ENOENT";
    return { accel: "tcg", reason: absent ? "no /dev/kvm" : "no permission to use /dev/kvm" };
  }
  const firmware = firmwareThatExits();
  const folder = await cached("kvm-probe", digest(firmware), async (temporary) => {
    writeFileSync(join(temporary, "firmware"), firmware);
  });
  const machine = [
    "-accel",
    "kvm",
    "-cpu",
    "host",
    "-machine",
    "q35",
    "-m",
    "16",
    "-nodefaults",
    "-display",
    "none",
  ];
  const exit = ["-device", `isa-debug-exit,iobase=${EXIT_PORT},iosize=1`, "-bios", join(folder, "firmware")];
  const withoutCore = ["sh", "-c", 'ulimit -c 0; exec "$@"', "sh"]; // a KVM that is half there aborts QEMU
  const { code } = await command([...withoutCore, qemu, ...machine, ...exit], { timeoutMs: 5_000 });
  return code === EXIT_CODE
    ? { accel: "kvm", reason: "/dev/kvm ran a test guest" }
    : { accel: "tcg", reason: "/dev/kvm is there but did not run a test guest" };
}

function firmwareThatExits(): Buffer {
  const image = Buffer.alloc(FIRMWARE_SIZE);
  image.set([0xba, EXIT_PORT & 0xff, EXIT_PORT >> 8, 0xb0, EXIT_VALUE, 0xee]); // mov dx, port; mov al, value; out dx, al
  const displacement = FIRMWARE_SIZE - (RESET_VECTOR + 3); // to offset 0, by wrapping around
  image.set([0xe9, displacement, 0], RESET_VECTOR); // jmp
  return image;
}
