import { lstatSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";

const MODE_FOLDER = 0o040755;
const MODE_FILE = 0o100755;
const MODE_LINK = 0o120777;

export type Entry =
  | { name: string; folder: true }
  | { name: string; link: string }
  | { name: string; contents: Uint8Array };

/** An archive that the kernel unpacks as initramfs ("newc", Documentation/driver-api/early-userspace/buffer-format.rst). */
export function packCpio(entries: readonly Entry[]): Buffer {
  const parts: Uint8Array[] = [];
  entries.forEach((entry, index) => {
    if ("folder" in entry) append(parts, index + 1, entry.name, MODE_FOLDER, Buffer.alloc(0));
    else if ("link" in entry) append(parts, index + 1, entry.name, MODE_LINK, Buffer.from(entry.link));
    else append(parts, index + 1, entry.name, MODE_FILE, entry.contents);
  });
  append(parts, 0, "TRAILER!!!", 0, Buffer.alloc(0));
  return Buffer.concat(parts);
}

/** Everything owned by root, written in 1970, executable: the same bytes from the same files. */
function append(parts: Uint8Array[], inode: number, name: string, mode: number, contents: Uint8Array): void {
  const links = 1;
  const nameSize = Buffer.byteLength(name) + 1;
  const [uid, gid, mtime, device, checksum] = [0, 0, 0, 0, 0];
  const fields = [
    inode,
    mode,
    uid,
    gid,
    links,
    mtime,
    contents.length,
    device,
    device,
    device,
    device,
    nameSize,
    checksum,
  ];
  const header = Buffer.from(`070701${fields.map((n) => n.toString(16).padStart(8, "0")).join("")}${name}\0`);
  parts.push(header, padding(header.length), contents, padding(contents.length));
}

const padding = (length: number) => Buffer.alloc((4 - (length % 4)) % 4);

/** The files, folders and links below `root`, folders first. */
export function entriesOf(root: string): Entry[] {
  const names = readdirSync(root, { recursive: true, encoding: "utf8" }).sort();
  return names.map((name): Entry => {
    const path = join(root, name);
    const stat = lstatSync(path);
    if (stat.isDirectory()) return { name, folder: true };
    if (stat.isSymbolicLink()) return { name, link: readlinkSync(path) };
    return { name, contents: readFileSync(path) };
  });
}
