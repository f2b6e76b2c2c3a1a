import type { GuestAccess } from "../../src/memory/guest-memory.ts";

/** Broken twin: a device that gets one bit of every `nth` large write wrong. */
export const flipping =
  (nth: number) =>
  (sound: GuestAccess): GuestAccess => {
    let writes = 0;
    return {
      read: (gpa, into) => sound.read(gpa, into),
      write: (gpa, from) => {
        const copy = from.slice();
        if (from.length > 100 && ++writes % nth === 0) copy[99]! ^= 4;
        sound.write(gpa, copy);
      },
      load16: (gpa) => sound.load16(gpa),
      store16: (gpa, value) => sound.store16(gpa, value),
      transfer: (...args) => sound.transfer(...args),
    };
  };
