import { Command } from "commander";
import { UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, formatBdf } from "../base/units.ts";
import { Attachment, STRATEGY } from "../control/attach.ts";
import { backgroundText } from "../control/background.ts";
import type { RunOptions } from "../control/run.ts";
import { LET_GO_MS_MAX } from "../machine/qemu/hotplug.ts";
import { withApi } from "./api.ts";
import { vmPinner } from "./machine-choice.ts";
import { API_OPTION, addPinOptions, intervalOf, optionOf, type PinOptions } from "./machine-options.ts";
import { number, writeJson } from "./output.ts";
import { Progress } from "./progress.ts";
import { takeSignals } from "./signals.ts";
import { parseBdfs, quotaFrames } from "./units.ts";

const SUMMARY_MS = 1000;

const EXAMPLES = `
Examples:
  qemu-system-x86_64 -machine pc,memory-backend=ram -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on \\
    -qmp unix:qmp.sock,server=on,wait=off …          QEMU 7.2, as it has to be started
  coiommu attach --qmp qmp.sock --disk disk.raw      one more disk, tracked
  coiommu attach --qmp qmp.sock --assigned 0000:00:05.0
                                                     what the VM has there already, tracked
  modprobe coiommu                                   in the guest, whenever you like

Ctrl-C takes our functions out of the VM, which goes on: unmount our disks first. Functions of
--assigned can map nothing new until coiommu attaches again; to end for good, unbind their drivers
and \`rmmod coiommu\` in the guest first. Without a guest that answers, a second Ctrl-C ends at once.

Our disks stand behind a software IOMMU: no DMA to a frame that is not pinned. Functions of
--assigned do not: what they map is pinned here and counted, but QEMU decides what they may reach,
and pins all of the guest's RAM for a function that it passes through with VFIO.`;

interface AttachCommandOptions extends PinOptions {
  readonly qmp: string;
  readonly assigned: readonly Bdf[];
  readonly disk: readonly string[];
  readonly faultCapableDisk: readonly string[];
  readonly api?: string;
  readonly json?: string;
}

export function attachCommand(): Command {
  const command = new Command("attach")
    .description("Add coIOMMU to a QEMU that is already running; the VM goes on when we leave.")
    .requiredOption("--qmp <socket>", "QEMU's QMP socket: -qmp unix:SOCKET,server=on,wait=off");
  const option = optionOf(command);
  option(
    "--assigned <list>",
    "functions of the VM to track, as the guest names them: 0000:00:05.0,…",
    parseBdfs,
    [],
    "none",
  );
  option(
    "--disk <file>",
    "plug a disk of ours too, with this raw image behind it; may be given more than once",
    (file, list) => [...(list as string[]), file],
    [],
    "none",
  );
  option(
    "--fault-capable-disk <file>",
    "the same for a disk that may fault on its buffers; in the guest: modprobe coiommu fault_capable=BDF,…",
    (file, list) => [...(list as string[]), file],
    [],
    "none",
  );
  addPinOptions(option);
  option(...API_OPTION);
  option("--json <file>", "write the result as JSON, to a file or to - (standard output)", (file) => file);
  return command.addHelpText("after", EXAMPLES).action(async (options: AttachCommandOptions) => {
    const progress = new Progress();
    try {
      await withApi(options.api, progress.warn, (api) => attach(options, progress, api));
    } finally {
      progress.stop();
    }
  });
}

async function attach(
  options: AttachCommandOptions,
  progress: Progress,
  api: RunOptions["api"],
): Promise<void> {
  const { qmp, assigned, policy, activationTimeout } = options;
  const disks = [
    ...options.disk.map((file) => ({ file, faultCapable: false })),
    ...options.faultCapableDisk.map((file) => ({ file, faultCapable: true })),
  ];
  const attachment = await Attachment.start({
    ...{ qmp, assigned, policy, activationTimeout, onWarning: progress.warn },
    interval: intervalOf(options),
    speculate: options.speculate,
    disks: disks.map((disk) => ({ ...disk, sizeMiB: 0 })),
    pinner: vmPinner(options.pinner, progress.warn),
    quota: (memoryMiB) => quotaFrames(options.quota, memoryMiB),
  });
  if (api) api.guest = { machine: attachment, options: { strategy: STRATEGY } };
  const forced = Promise.withResolvers<"forced">();
  const summary = setInterval(() => progress.step(summaryOf(attachment)), SUMMARY_MS);
  takeSignals(leaving(attachment, progress, () => forced.resolve("forced")));
  try {
    const where = formatBdf(attachment.bdfOf()!);
    progress.note(
      `attached to QEMU ${attachment.version}: ${where} is coIOMMU; in the guest: modprobe coiommu`,
    );
    disks.forEach(({ file, faultCapable }, i) => {
      const bdf = attachment.bdfOf(attachment.diskIds[i]);
      const disk = faultCapable ? "fault-capable disk" : "disk";
      if (bdf !== undefined) progress.note(`${formatBdf(bdf)} is the ${disk} ${file}`);
    });
    const how = await Promise.race([attachment.ended, forced.promise, attachment.failed]);
    clearInterval(summary);
    const end = await attachment.close();
    progress.stop();
    writeJson(options.json, attachment.result(end));
    tellEnd(how, attachment, assigned, progress);
  } finally {
    clearInterval(summary);
    if (api) api.guest = undefined;
    await attachment.close();
  }
}

/** The first signal asks the guest to let go of our functions, the next one ends without it. */
function leaving(attachment: Attachment, progress: Progress, force: () => void): () => void {
  let asked = false;
  return () => {
    if (asked) return force();
    asked = true;
    progress.note("coiommu: asking the guest to let go of our functions; once more, and we end without it");
    void attachment.detach(LET_GO_MS_MAX).then((left) => {
      if (left.length > 0)
        progress.note(`coiommu: the guest has not let go of ${left.join(", ")}: still serving the VM`);
    });
  };
}

function tellEnd(
  how: "detached" | "qemu-ended" | "forced",
  { pins }: Attachment,
  assigned: readonly Bdf[],
  progress: Progress,
): void {
  if (how === "forced")
    throw new UserError(
      "ended while the guest still has our functions: what it tracks can map nothing new; " +
        "device_del coiommu, and reset the VM, before coiommu attaches again",
      1,
    );
  progress.note(how === "qemu-ended" ? "QEMU has ended" : "detached; the VM goes on");
  if (how === "detached" && assigned.length > 0 && pins.pinRequests > 0)
    progress.note(
      `until coiommu attaches again, ${assigned.map(formatBdf).join(", ")} can map nothing new in the guest, ` +
        "unless its module was unloaded",
    );
}

function summaryOf({ pins }: Attachment): string {
  const mib = (frames: number) => `${number((frames * FRAME_SIZE) / 2 ** 20)} MiB`;
  const pinning = backgroundText(pins);
  if (pinning !== undefined) return pinning;
  return `pinned ${mib(pins.framesNow)}, mapped ${mib(pins.framesMapped)}, ${pins.pinRequests} pin requests`;
}
