//! The derive macro of `resilient-heap`; use it through that crate, which re-exports it.
//!
//! # `Persist`
//! - On a struct with `#[repr(C)]` or `#[repr(transparent)]`, all of whose fields are `Persist`.
//! - On an enum without fields, with `#[repr(u8)]`.
//!
//! # What is refused at compile time
//! - Another or no representation: the layout would depend on the compiler.
//! - Padding between or behind fields (order them by size, or name the gap).
//! - Fields that are not `Persist`: references, raw pointers, functions, `Box`, `File`, cells, `usize`.
//! - More than one lifetime: a value belongs to one heap.
//! - A destructor.
//! - Enums with fields, unions, empty types.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::quote;
use syn::{
    Attribute, Data, DataEnum, DataStruct, DeriveInput, Error, Fields, GenericParam, Index,
    Lifetime, LifetimeParam, Result, parse_macro_input, parse_quote,
};

/// Lets values of a type be stored in a resilient heap.
#[proc_macro_derive(Persist, attributes(persist))]
pub fn persist(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    derive(&input)
        .unwrap_or_else(Error::into_compile_error)
        .into()
}

fn derive(input: &DeriveInput) -> Result<Tokens> {
    let home = home(&input.attrs)?;
    match &input.data {
        Data::Struct(data) => {
            representation(input, &["C", "transparent"])?;
            of_struct(input, data, &home)
        }
        Data::Enum(data) => {
            representation(input, &["u8"])?;
            of_enum(input, data, &home)
        }
        Data::Union(_) => Err(Error::new_spanned(
            &input.ident,
            "a union cannot be stored: nobody knows what is in it",
        )),
    }
}

/// The path of the crate: another one within itself.
fn home(attributes: &[Attribute]) -> Result<Tokens> {
    let mut home = quote!(::resilient_heap);
    for attribute in attributes.iter().filter(|a| a.path().is_ident("persist")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("crate") {
                home = quote!(crate);
                Ok(())
            } else {
                Err(meta.error("unknown word"))
            }
        })?;
    }
    Ok(home)
}

/// Refuses layouts that depend on the compiler, and packed ones.
fn representation(input: &DeriveInput, wanted: &[&str]) -> Result<()> {
    let mut found = false;
    let mut other = None;
    for attribute in input.attrs.iter().filter(|a| a.path().is_ident("repr")) {
        attribute.parse_nested_meta(|meta| {
            if wanted.iter().any(|word| meta.path.is_ident(word)) {
                found = true;
            } else {
                other = Some(meta.error("this representation cannot be stored"));
                if meta.input.peek(syn::token::Paren) {
                    let inner;
                    syn::parenthesized!(inner in meta.input);
                    let _: Tokens = inner.parse()?;
                }
            }
            Ok(())
        })?;
    }
    match (found, other) {
        (_, Some(error)) => Err(error),
        (true, None) => Ok(()),
        (false, None) => Err(Error::new_spanned(
            &input.ident,
            format!(
                "needs #[repr({})], so that the layout does not depend on the compiler",
                wanted[0]
            ),
        )),
    }
}

/// The lifetime that stands for the heap: the type's own, or a new one.
fn heap_lifetime(input: &DeriveInput) -> Result<(Lifetime, bool)> {
    let mut lifetimes = input.generics.lifetimes();
    match (lifetimes.next(), lifetimes.next()) {
        (None, _) => Ok((parse_quote!('__heap), false)),
        (Some(one), None) => Ok((one.lifetime.clone(), true)),
        (Some(_), Some(two)) => Err(Error::new_spanned(
            two,
            "a value belongs to one heap: it has at most one lifetime",
        )),
    }
}

fn of_struct(input: &DeriveInput, data: &DataStruct, home: &Tokens) -> Result<Tokens> {
    let fields: Vec<_> = data.fields.iter().collect();
    if fields.is_empty() {
        return Err(Error::new_spanned(
            &input.ident,
            "an empty type cannot be stored",
        ));
    }
    let types: Vec<_> = fields.iter().map(|field| &field.ty).collect();
    let members: Vec<Tokens> = fields
        .iter()
        .enumerate()
        .map(|(i, field)| match &field.ident {
            Some(ident) => quote!(#ident),
            None => {
                let index = Index::from(i);
                quote!(#index)
            }
        })
        .collect();
    let names: Vec<String> = members.iter().map(ToString::to_string).collect();
    let (heap, _) = heap_lifetime(input)?;
    let describe = quote! {
        schema.begin::<Self>("struct");
        #( schema.field::<#types>(#names, ::core::mem::offset_of!(Self, #members)); )*
        schema.end();
        #( <#types as #home::Persist<#heap>>::describe(schema); )*
    };
    let body = quote! {
        const POINTERS: bool = {
            ::core::assert!(
                ::core::mem::size_of::<Self>() == 0 #( + ::core::mem::size_of::<#types>() )*,
                "the struct has padding: order its fields by size, or name the gap"
            );
            ::core::assert!(
                !::core::mem::needs_drop::<Self>(),
                "a stored value has no destructor: nobody would run it"
            );
            false #( || <#types as #home::Persist<#heap>>::POINTERS )*
        };
        unsafe fn check(at: *const u8) -> bool {
            // SAFETY: the caller gives the bytes of the whole value, so those of each field.
            true #( && unsafe {
                <#types as #home::Persist<#heap>>::check(
                    at.add(::core::mem::offset_of!(Self, #members)),
                )
            } )*
        }
        fn edges(&self, visit: &mut dyn ::core::ops::FnMut(#home::Edge)) {
            #( <#types as #home::Persist<#heap>>::edges(&self.#members, visit); )*
        }
    };
    finish(input, home, &body, &describe)
}

fn of_enum(input: &DeriveInput, data: &DataEnum, home: &Tokens) -> Result<Tokens> {
    let with_fields = data
        .variants
        .iter()
        .find(|v| !matches!(v.fields, Fields::Unit));
    if let Some(variant) = with_fields {
        return Err(Error::new_spanned(
            variant,
            "an enum with fields cannot be stored: its variants leave bytes uninitialized",
        ));
    }
    if data.variants.is_empty() {
        return Err(Error::new_spanned(
            &input.ident,
            "an empty type cannot be stored",
        ));
    }
    let variants: Vec<_> = data.variants.iter().map(|v| &v.ident).collect();
    let names: Vec<String> = variants.iter().map(ToString::to_string).collect();
    let describe = quote! {
        schema.begin::<Self>("enum");
        #( schema.variant(#names, Self::#variants as u8); )*
        schema.end();
    };
    let body = quote! {
        const POINTERS: bool = {
            ::core::assert!(
                !::core::mem::needs_drop::<Self>(),
                "a stored value has no destructor: nobody would run it"
            );
            false
        };
        unsafe fn check(at: *const u8) -> bool {
            // SAFETY: the caller gives one initialized byte.
            let byte = unsafe { at.read() };
            false #( || byte == Self::#variants as u8 )*
        }
    };
    finish(input, home, &body, &describe)
}

fn finish(input: &DeriveInput, home: &Tokens, body: &Tokens, describe: &Tokens) -> Result<Tokens> {
    let ident = &input.ident;
    let name = ident.to_string();
    let (heap, own) = heap_lifetime(input)?;
    let mut generics = input.generics.clone();
    if !own {
        let lifetime = GenericParam::Lifetime(LifetimeParam::new(heap.clone()));
        generics.params.insert(0, lifetime);
    }
    for parameter in generics.type_params_mut() {
        parameter.bounds.push(parse_quote!(#home::Persist<#heap>));
    }
    let (impl_generics, _, where_clause) = generics.split_for_impl();
    let (_, type_generics, _) = input.generics.split_for_impl();
    let parameters: Vec<_> = input.generics.type_params().map(|p| &p.ident).collect();
    let family = if input.generics.type_params().next().is_none()
        && input.generics.const_params().next().is_none()
    {
        let (family_generics, at, fixed) = if own {
            (
                quote!(<#heap>),
                quote!(#ident<'__at>),
                quote!(#ident<'static>),
            )
        } else {
            (quote!(), quote!(#ident), quote!(#ident))
        };
        quote! {
            #[automatically_derived]
            impl #family_generics #home::Family for #ident #type_generics {
                type At<'__at> = #at;
            }
            // Computed here, so that its refusals come with the type and not with its first use.
            const _: bool = <#fixed as #home::Persist<'static>>::POINTERS;
        }
    } else {
        quote!()
    };
    Ok(quote! {
        // SAFETY: the layout is that of the representation, which the macro checked; padding and a
        // destructor are refused by the assertions in `POINTERS`, and fields of other types by the
        // bounds.
        #[allow(unsafe_code)]
        #[automatically_derived]
        unsafe impl #impl_generics #home::Persist<#heap> for #ident #type_generics #where_clause {
            const NAME: &'static str = #name;
            #body
            fn name(out: &mut #home::alloc::string::String) {
                out.push_str(#name);
                let mut separator = "<";
                #(
                    out.push_str(::core::mem::replace(&mut separator, ", "));
                    <#parameters as #home::Persist<#heap>>::name(out);
                )*
                if separator != "<" {
                    out.push('>');
                }
            }
            fn describe(schema: &mut #home::Schema) {
                if schema.enter::<Self>() {
                    #describe
                }
            }
        }
        #family
    })
}
