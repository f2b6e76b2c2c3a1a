/** A disk that firmware boots from: it reads a part of itself, sums it up, writes the sum, and says so on the serial port. */

/** Of address 0x7c00 on. */
const LISTING = `
7c00  fa           cli
7c01  31 c0        xor ax, ax
7c03  8e d8        mov ds, ax
7c05  8e d0        mov ss, ax
7c07  bc 00 7c     mov sp, 0x7c00
7c0a  fb           sti
7c0b  fc           cld
7c0c  be 90 7d     mov si, 0x7d90      ; READ, with the drive that the BIOS has left in dl
7c0f  b4 42        mov ah, 0x42
7c11  cd 13        int 0x13
7c13  72 28        jc 0x7c3d
7c15  b8 00 10     mov ax, 0x1000
7c18  8e d8        mov ds, ax
7c1a  31 f6        xor si, si
7c1c  31 db        xor bx, bx
7c1e  b9 00 40     mov cx, 0x4000      ; 16-bit words of 32 KiB
7c21  ad           lodsw
7c22  01 c3        add bx, ax
7c24  e2 fb        loop 0x7c21
7c26  31 c0        xor ax, ax
7c28  8e d8        mov ds, ax
7c2a  89 1e 00 7e  mov [0x7e00], bx
7c2e  be a0 7d     mov si, 0x7da0      ; WRITE
7c31  b8 00 43     mov ax, 0x4300
7c34  cd 13        int 0x13
7c36  72 05        jc 0x7c3d
7c38  be b0 7d     mov si, 0x7db0      ; DONE
7c3b  eb 03        jmp 0x7c40
7c3d  be d0 7d     mov si, 0x7dd0      ; FAILED
7c40  ac           lodsb               ; the text at si, to the first serial port
7c41  84 c0        test al, al
7c43  74 12        jz 0x7c57
7c45  88 c4        mov ah, al
7c47  ba fd 03     mov dx, 0x3fd
7c4a  ec           in al, dx
7c4b  a8 20        test al, 0x20
7c4d  74 fb        jz 0x7c4a
7c4f  88 e0        mov al, ah
7c51  ba f8 03     mov dx, 0x3f8
7c54  ee           out dx, al
7c55  eb e9        jmp 0x7c40
7c57  f4           hlt
7c58  eb fd        jmp 0x7c57
`;
const [READ, WRITE, DONE, FAILED, SIGNATURE] = [0x190, 0x1a0, 0x1b0, 0x1d0, 0x1fe];

const SECTOR = 512;
const FIRST_READ = 1;
const SECTORS_READ = 64;
export const SECTOR_WRITTEN = 100;
export const SAYS_DONE = "coIOMMU: read, written";
export const SAYS_FAILED = "coIOMMU: disk error";

/** Disk address packet of int 13h, functions 42h and 43h. */
function packet(sectors: number, segment: number, offset: number, first: number): Uint8Array {
  const bytes = new Uint8Array(16);
  const view = new DataView(bytes.buffer);
  view.setUint8(0, bytes.length);
  view.setUint16(2, sectors, true);
  view.setUint16(4, offset, true);
  view.setUint16(6, segment, true);
  view.setBigUint64(8, BigInt(first), true);
  return bytes;
}

/** An image of `size` bytes, and the sum that its program comes to. */
export function bootImage(size: number): { image: Uint8Array; sum: number } {
  const image = new Uint8Array(size);
  const code = LISTING.trim()
    .split("\n")
    .flatMap((line) => line.slice(6, 17).trim().split(" "));
  image.set(code.map((byte) => Number.parseInt(byte, 16)));
  image.set(packet(SECTORS_READ, 0x1000, 0, FIRST_READ), READ);
  image.set(packet(1, 0, 0x7e00, SECTOR_WRITTEN), WRITE);
  image.set(Buffer.from(`${SAYS_DONE}\r\n`), DONE);
  image.set(Buffer.from(`${SAYS_FAILED}\r\n`), FAILED);
  image.set([0x55, 0xaa], SIGNATURE);
  const data = new DataView(image.buffer, FIRST_READ * SECTOR, SECTORS_READ * SECTOR);
  let sum = 0;
  for (let at = 0; at < data.byteLength; at += 2) {
    data.setUint16(at, (at * 40_503) & 0xffff, true);
    sum = (sum + data.getUint16(at, true)) & 0xffff;
  }
  return { image, sum };
}

/** What its program has written. */
export const writtenSum = (image: Uint8Array): number =>
  new DataView(image.buffer, image.byteOffset).getUint16(SECTOR_WRITTEN * SECTOR, true);
