# From the moment that the machine is on: into 64 bits, into programs, and back out of them.

.section .note.pvh, "a", @note
.align 4
.long 4, 4, 18          # XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.long start32

.section .boot, "ax"
.code32
.global start32
start32:
    cli
    cld
    mov %ebx, %esi      # what the machine says about itself
    mov $bss_begin, %edi
    mov $bss_end, %ecx
    sub %edi, %ecx
    shr $2, %ecx
    xor %eax, %eax
    rep stosl

    movl $pdpt + 7, pml4
    movl $low + 7, pdpt
    xor %ecx, %ecx
1:  mov %ecx, %eax      # the first GiB, in pages of 2 MiB, for the kernel only
    shl $21, %eax
    or $0x83, %eax
    mov %eax, low(,%ecx,8)
    inc %ecx
    cmp $512, %ecx
    jne 1b
    movl $0x200085, low + 8     # code and constants: for programs too, and not to be written

    mov %cr4, %eax
    or $0x620, %eax     # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax     # LME
    wrmsr
    mov %cr0, %eax
    and $0xfffffff3, %eax   # neither EM nor TS
    or $0x80010003, %eax    # PG, WP, MP, PE
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $start64

.code64
start64:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $stack_end, %rsp
    fninit
    mov %esi, %edi
    call kernel_main
2:  cli
    hlt
    jmp 2b

# extern "C" fn enter(): goes on with the program whose registers are in `context` and `fx`; returns
# when anything interrupts it, with its registers there again.
.global enter
enter:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, kernel_stack
    fxrstor64 fx
    mov $context, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rbp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    add $16, %rsp
    iretq

# The processor's stack is now the upper end of `context`, so that all is pushed to its place there.
interrupted:
    testb $3, 24(%rsp)
    jz within_kernel
    push %rax
    push %rbx
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    fxsave64 fx
    cld
    mov kernel_stack, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret

within_kernel:
    mov %rsp, %rdi
    and $-16, %rsp
    call kernel_fault
3:  cli
    hlt
    jmp 3b

# One entry for each vector, of 16 bytes: 0 to 47, and the one of `int 0x80` as number 48.
.align 16
.global stubs
stubs:
.irp number,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48
    .align 16
    .if !((\number == 8) || ((\number >= 10) && (\number <= 14)) || (\number == 17) || (\number == 21) || (\number == 29) || (\number == 30))
    push $0             # where the processor pushes no error code
    .endif
    push $\number
    jmp interrupted
.endr

.section .data.gdt, "aw"
.align 16
.global gdt
gdt:
    .quad 0
    .quad 0x00209a0000000000    # 0x08: the kernel's code
    .quad 0x0000920000000000    # 0x10: the kernel's data
    .quad 0x0000f20000000000    # 0x18: programs' data
    .quad 0x0020fa0000000000    # 0x20: programs' code
    .quad 0, 0                  # 0x28: the task state segment
gdt_pointer:
    .word 55
    .quad gdt

.section .bss.boot, "aw", @nobits
.align 4096
.global pml4, pdpt, low, middle, table, durable
pml4:    .skip 4096
pdpt:    .skip 4096
low:     .skip 4096
middle:  .skip 4096     # the second GiB, where programs have their memory
table:   .skip 4096
durable: .skip 4096     # the GiB with the memory that survives
.align 16
.global context, fx, tss
context: .skip 176
fx:      .skip 512
tss:     .skip 112
kernel_stack: .skip 8
.align 4096
.skip 262144
stack_end:
